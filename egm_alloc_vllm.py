"""The entry point of the vLLM plugin. Outside of the package, because importing that enables it."""

import logging
import os

SWITCH = "EGM_ALLOC_VLLM"
_AUTO_ENABLE = "EGM_ALLOC_AUTO_ENABLE"


def is_configured() -> bool:
    """Whether the environment asks for the plugin: ``EGM_ALLOC_VLLM=1``, or a setting of its own.

    Returns
    -------
    bool
        False with ``EGM_ALLOC_VLLM=0``, whatever else is set.
    """
    if os.environ.get(SWITCH, "").strip():
        return not is_switched_off()
    return any(name.startswith(SWITCH + "_") and os.environ[name].strip() for name in os.environ)


def is_switched_off() -> bool:
    """Whether the environment has ``EGM_ALLOC_VLLM=0``, or another word for no.

    Returns
    -------
    bool
    """
    return os.environ.get(SWITCH, "").strip().lower() in ("0", "false", "no", "off")


def register() -> None:
    """Install the plugin into this process of vLLM, if it is configured.

    vLLM calls this in each of its processes, perhaps more than once, before CUDA is up. Nothing
    here calls CUDA, and nothing is raised into vLLM: what fails is logged, and vLLM goes on alone.
    """
    if not is_configured():
        return
    try:
        _install()
    except Exception:
        # vLLM shows what is logged below "vllm".
        logging.getLogger("vllm.egm_alloc").exception(
            "egm_alloc: the plugin could not be installed; vLLM goes on without it"
        )


def _install() -> None:
    before = os.environ.get(_AUTO_ENABLE)
    os.environ[_AUTO_ENABLE] = "0"  # the workers enable it, for themselves
    try:
        from egm_alloc.vllm import plugin
    finally:
        if before is None:
            del os.environ[_AUTO_ENABLE]
        else:
            os.environ[_AUTO_ENABLE] = before
    plugin.install()
