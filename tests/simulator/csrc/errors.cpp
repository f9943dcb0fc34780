// Names and texts of errors. Driver and runtime errors share their numbers, so one table serves
// both.
#include <cstring>

#include "api.h"

namespace egm_sim {
namespace {

struct ErrorName {
  int number;
  const char* name;
};

#define SIM_ERROR(name) {name, #name}
constexpr ErrorName kRuntime[] = {
    SIM_ERROR(cudaSuccess),
    SIM_ERROR(cudaErrorInvalidValue),
    SIM_ERROR(cudaErrorMemoryAllocation),
    SIM_ERROR(cudaErrorInitializationError),
    SIM_ERROR(cudaErrorCudartUnloading),
    SIM_ERROR(cudaErrorProfilerDisabled),
    SIM_ERROR(cudaErrorProfilerNotInitialized),
    SIM_ERROR(cudaErrorProfilerAlreadyStarted),
    SIM_ERROR(cudaErrorProfilerAlreadyStopped),
    SIM_ERROR(cudaErrorInvalidConfiguration),
    SIM_ERROR(cudaErrorInvalidPitchValue),
    SIM_ERROR(cudaErrorInvalidSymbol),
    SIM_ERROR(cudaErrorInvalidHostPointer),
    SIM_ERROR(cudaErrorInvalidDevicePointer),
    SIM_ERROR(cudaErrorInvalidTexture),
    SIM_ERROR(cudaErrorInvalidTextureBinding),
    SIM_ERROR(cudaErrorInvalidChannelDescriptor),
    SIM_ERROR(cudaErrorInvalidMemcpyDirection),
    SIM_ERROR(cudaErrorAddressOfConstant),
    SIM_ERROR(cudaErrorTextureFetchFailed),
    SIM_ERROR(cudaErrorTextureNotBound),
    SIM_ERROR(cudaErrorSynchronizationError),
    SIM_ERROR(cudaErrorInvalidFilterSetting),
    SIM_ERROR(cudaErrorInvalidNormSetting),
    SIM_ERROR(cudaErrorMixedDeviceExecution),
    SIM_ERROR(cudaErrorNotYetImplemented),
    SIM_ERROR(cudaErrorMemoryValueTooLarge),
    SIM_ERROR(cudaErrorStubLibrary),
    SIM_ERROR(cudaErrorInsufficientDriver),
    SIM_ERROR(cudaErrorCallRequiresNewerDriver),
    SIM_ERROR(cudaErrorInvalidSurface),
    SIM_ERROR(cudaErrorDuplicateVariableName),
    SIM_ERROR(cudaErrorDuplicateTextureName),
    SIM_ERROR(cudaErrorDuplicateSurfaceName),
    SIM_ERROR(cudaErrorDevicesUnavailable),
    SIM_ERROR(cudaErrorIncompatibleDriverContext),
    SIM_ERROR(cudaErrorMissingConfiguration),
    SIM_ERROR(cudaErrorPriorLaunchFailure),
    SIM_ERROR(cudaErrorLaunchMaxDepthExceeded),
    SIM_ERROR(cudaErrorLaunchFileScopedTex),
    SIM_ERROR(cudaErrorLaunchFileScopedSurf),
    SIM_ERROR(cudaErrorSyncDepthExceeded),
    SIM_ERROR(cudaErrorLaunchPendingCountExceeded),
    SIM_ERROR(cudaErrorInvalidDeviceFunction),
    SIM_ERROR(cudaErrorNoDevice),
    SIM_ERROR(cudaErrorInvalidDevice),
    SIM_ERROR(cudaErrorDeviceNotLicensed),
    SIM_ERROR(cudaErrorSoftwareValidityNotEstablished),
    SIM_ERROR(cudaErrorStartupFailure),
    SIM_ERROR(cudaErrorInvalidKernelImage),
    SIM_ERROR(cudaErrorDeviceUninitialized),
    SIM_ERROR(cudaErrorMapBufferObjectFailed),
    SIM_ERROR(cudaErrorUnmapBufferObjectFailed),
    SIM_ERROR(cudaErrorArrayIsMapped),
    SIM_ERROR(cudaErrorAlreadyMapped),
    SIM_ERROR(cudaErrorNoKernelImageForDevice),
    SIM_ERROR(cudaErrorAlreadyAcquired),
    SIM_ERROR(cudaErrorNotMapped),
    SIM_ERROR(cudaErrorNotMappedAsArray),
    SIM_ERROR(cudaErrorNotMappedAsPointer),
    SIM_ERROR(cudaErrorECCUncorrectable),
    SIM_ERROR(cudaErrorUnsupportedLimit),
    SIM_ERROR(cudaErrorDeviceAlreadyInUse),
    SIM_ERROR(cudaErrorPeerAccessUnsupported),
    SIM_ERROR(cudaErrorInvalidPtx),
    SIM_ERROR(cudaErrorInvalidGraphicsContext),
    SIM_ERROR(cudaErrorNvlinkUncorrectable),
    SIM_ERROR(cudaErrorJitCompilerNotFound),
    SIM_ERROR(cudaErrorUnsupportedPtxVersion),
    SIM_ERROR(cudaErrorJitCompilationDisabled),
    SIM_ERROR(cudaErrorUnsupportedExecAffinity),
    SIM_ERROR(cudaErrorUnsupportedDevSideSync),
    SIM_ERROR(cudaErrorContained),
    SIM_ERROR(cudaErrorInvalidSource),
    SIM_ERROR(cudaErrorFileNotFound),
    SIM_ERROR(cudaErrorSharedObjectSymbolNotFound),
    SIM_ERROR(cudaErrorSharedObjectInitFailed),
    SIM_ERROR(cudaErrorOperatingSystem),
    SIM_ERROR(cudaErrorInvalidResourceHandle),
    SIM_ERROR(cudaErrorIllegalState),
    SIM_ERROR(cudaErrorLossyQuery),
    SIM_ERROR(cudaErrorSymbolNotFound),
    SIM_ERROR(cudaErrorNotReady),
    SIM_ERROR(cudaErrorIllegalAddress),
    SIM_ERROR(cudaErrorLaunchOutOfResources),
    SIM_ERROR(cudaErrorLaunchTimeout),
    SIM_ERROR(cudaErrorLaunchIncompatibleTexturing),
    SIM_ERROR(cudaErrorPeerAccessAlreadyEnabled),
    SIM_ERROR(cudaErrorPeerAccessNotEnabled),
    SIM_ERROR(cudaErrorSetOnActiveProcess),
    SIM_ERROR(cudaErrorContextIsDestroyed),
    SIM_ERROR(cudaErrorAssert),
    SIM_ERROR(cudaErrorTooManyPeers),
    SIM_ERROR(cudaErrorHostMemoryAlreadyRegistered),
    SIM_ERROR(cudaErrorHostMemoryNotRegistered),
    SIM_ERROR(cudaErrorHardwareStackError),
    SIM_ERROR(cudaErrorIllegalInstruction),
    SIM_ERROR(cudaErrorMisalignedAddress),
    SIM_ERROR(cudaErrorInvalidAddressSpace),
    SIM_ERROR(cudaErrorInvalidPc),
    SIM_ERROR(cudaErrorLaunchFailure),
    SIM_ERROR(cudaErrorCooperativeLaunchTooLarge),
    SIM_ERROR(cudaErrorTensorMemoryLeak),
    SIM_ERROR(cudaErrorNotPermitted),
    SIM_ERROR(cudaErrorNotSupported),
    SIM_ERROR(cudaErrorSystemNotReady),
    SIM_ERROR(cudaErrorSystemDriverMismatch),
    SIM_ERROR(cudaErrorCompatNotSupportedOnDevice),
    SIM_ERROR(cudaErrorMpsConnectionFailed),
    SIM_ERROR(cudaErrorMpsRpcFailure),
    SIM_ERROR(cudaErrorMpsServerNotReady),
    SIM_ERROR(cudaErrorMpsMaxClientsReached),
    SIM_ERROR(cudaErrorMpsMaxConnectionsReached),
    SIM_ERROR(cudaErrorMpsClientTerminated),
    SIM_ERROR(cudaErrorCdpNotSupported),
    SIM_ERROR(cudaErrorCdpVersionMismatch),
    SIM_ERROR(cudaErrorStreamCaptureUnsupported),
    SIM_ERROR(cudaErrorStreamCaptureInvalidated),
    SIM_ERROR(cudaErrorStreamCaptureMerge),
    SIM_ERROR(cudaErrorStreamCaptureUnmatched),
    SIM_ERROR(cudaErrorStreamCaptureUnjoined),
    SIM_ERROR(cudaErrorStreamCaptureIsolation),
    SIM_ERROR(cudaErrorStreamCaptureImplicit),
    SIM_ERROR(cudaErrorCapturedEvent),
    SIM_ERROR(cudaErrorStreamCaptureWrongThread),
    SIM_ERROR(cudaErrorTimeout),
    SIM_ERROR(cudaErrorGraphExecUpdateFailure),
    SIM_ERROR(cudaErrorExternalDevice),
    SIM_ERROR(cudaErrorInvalidClusterSize),
    SIM_ERROR(cudaErrorFunctionNotLoaded),
    SIM_ERROR(cudaErrorInvalidResourceType),
    SIM_ERROR(cudaErrorInvalidResourceConfiguration),
    SIM_ERROR(cudaErrorUnknown),
};

// Spellings of the driver that a test may want to inject.
constexpr ErrorName kDriver[] = {
    SIM_ERROR(CUDA_ERROR_INVALID_VALUE),    SIM_ERROR(CUDA_ERROR_OUT_OF_MEMORY),
    SIM_ERROR(CUDA_ERROR_NOT_INITIALIZED),  SIM_ERROR(CUDA_ERROR_NO_DEVICE),
    SIM_ERROR(CUDA_ERROR_INVALID_DEVICE),   SIM_ERROR(CUDA_ERROR_INVALID_CONTEXT),
    SIM_ERROR(CUDA_ERROR_OPERATING_SYSTEM), SIM_ERROR(CUDA_ERROR_INVALID_HANDLE),
    SIM_ERROR(CUDA_ERROR_ILLEGAL_STATE),    SIM_ERROR(CUDA_ERROR_NOT_FOUND),
    SIM_ERROR(CUDA_ERROR_NOT_READY),        SIM_ERROR(CUDA_ERROR_ILLEGAL_ADDRESS),
    SIM_ERROR(CUDA_ERROR_NOT_PERMITTED),    SIM_ERROR(CUDA_ERROR_NOT_SUPPORTED),
    SIM_ERROR(CUDA_ERROR_UNKNOWN),
};
#undef SIM_ERROR

}  // namespace

const char* error_name(int error) {
  for (const ErrorName& entry : kRuntime) {
    if (entry.number == error) return entry.name;
  }
  return nullptr;
}

int error_number(const char* name) {
  for (const ErrorName& entry : kRuntime) {
    if (std::strcmp(entry.name, name) == 0) return entry.number;
  }
  for (const ErrorName& entry : kDriver) {
    if (std::strcmp(entry.name, name) == 0) return entry.number;
  }
  return -1;
}

const char* error_text(int error) {
  switch (error) {
    case cudaSuccess:
      return "no error";
    case cudaErrorInvalidValue:
      return "invalid argument";
    case cudaErrorMemoryAllocation:
      return "out of memory";
    case cudaErrorInitializationError:
      return "initialization error";
    case cudaErrorInsufficientDriver:
      return "CUDA driver version is insufficient for CUDA runtime version";
    case cudaErrorNoDevice:
      return "no CUDA-capable device is detected";
    case cudaErrorInvalidDevice:
      return "invalid device ordinal";
    case cudaErrorInvalidResourceHandle:
      return "invalid resource handle";
    case cudaErrorNotReady:
      return "device not ready";
    case cudaErrorNotSupported:
      return "operation not supported";
    case cudaErrorStreamCaptureUnsupported:
      return "operation not permitted when stream is capturing";
    case cudaErrorStreamCaptureInvalidated:
      return "operation failed due to a previous error during capture";
    case cudaErrorStreamCaptureImplicit:
      return "operation would make the legacy stream depend on a capturing blocking stream";
    case cudaErrorPeerAccessAlreadyEnabled:
      return "peer access is already enabled";
    default:
      break;
  }
  const char* name = error_name(error);
  return name ? name : "unrecognized error code";
}

}  // namespace egm_sim
