"""The entry point that vLLM calls in each of its processes (group ``vllm.general_plugins``)."""

import logging
import os

logger = logging.getLogger("vllm.dspark")


def register() -> None:
    """Put the hooks in place. Idempotent and cheap; a failure is logged and leaves vLLM as it is.

    ``VLLM_DSPARK=0`` turns the plugin off; so does leaving ``dspark`` out of ``VLLM_PLUGINS``.
    """
    if os.environ.get("VLLM_DSPARK", "1") == "0":
        logger.info("vllm-dspark is off (VLLM_DSPARK=0)")
        return
    try:
        from vllm_dspark.engine import hooks

        hooks.install()
    except Exception:
        logger.exception("vllm-dspark could not start; vLLM runs without it")
