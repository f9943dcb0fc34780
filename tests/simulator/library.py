"""The C functions by which tests control the simulator (csrc/control.cpp)."""

from __future__ import annotations

import ctypes


def declare(library: ctypes.CDLL) -> None:
    """Say which arguments and results are more than an int."""
    c_long, c_int, c_text, c_address = (
        ctypes.c_long,
        ctypes.c_int,
        ctypes.c_char_p,
        ctypes.c_size_t,
    )
    library.egm_sim_fail_call.argtypes = [c_text, c_text, c_long, c_long]
    library.egm_sim_stall_call.argtypes = [c_text, ctypes.c_double]
    library.egm_sim_wait_until_reached.argtypes = [c_int, ctypes.c_double]
    library.egm_sim_faults_fired.restype = c_long
    library.egm_sim_calls_counted.restype = c_long
    library.egm_sim_start_log.argtypes = [c_int, ctypes.c_size_t]
    library.egm_sim_take_log.restype = ctypes.c_void_p
    library.egm_sim_live.restype = ctypes.c_void_p
    library.egm_sim_free_text.argtypes = [ctypes.c_void_p]
    library.egm_sim_hold.argtypes = [c_address, c_int, c_int]
    library.egm_sim_machine.restype = c_text
    library.egm_sim_host_bytes.restype = ctypes.c_size_t
    library.egm_sim_egm_bytes.restype = ctypes.c_size_t
    library.egm_sim_set_hbm.argtypes = [c_int, ctypes.c_size_t]
    library.egm_sim_resident.argtypes = [c_address, ctypes.c_size_t, c_int]
    library.egm_sim_resident.restype = ctypes.c_longlong
    library.egm_sim_touch.argtypes = [c_address, ctypes.c_size_t, c_int]
    library.egm_sim_host_numa.argtypes = [c_int, ctypes.c_void_p]
    library.egm_sim_set_host_numa.argtypes = [c_int, ctypes.c_size_t]
    library.egm_sim_reserved_bytes.restype = ctypes.c_size_t
    library.egm_sim_unmapped_while_busy.restype = c_long
