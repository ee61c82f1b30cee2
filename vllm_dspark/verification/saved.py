"""What the policy keeps over a restart: the fleet, the temperatures, the corrections of the costs."""

import logging
from collections.abc import Mapping
from typing import Any

from vllm_dspark.verification.cost import CostModel
from vllm_dspark.verification.history import History
from vllm_dspark.verification.online import OnlineSTS

logger = logging.getLogger("vllm.dspark")


def collect(history: History, sts: OnlineSTS, cost: CostModel | None) -> dict[str, Any]:
    """The state, JSON-ready."""
    return {"fleet": history.state(), "calibration": sts.state(), "cost": None if cost is None else cost.state()}


def restore(state: Mapping[str, Any], history: History, cost: CostModel | None) -> OnlineSTS | None:
    """Put a state back; the calibration, or None, with one warning and nothing changed, if it does not fit."""
    try:
        sts = OnlineSTS.from_state(state["calibration"])
        if sts.width != history.width:
            raise ValueError(f"made for {sts.width} drafts, wanted {history.width}")
        History(history.width).load_state(state["fleet"])
        if cost is not None and state["cost"] is not None:
            cost.load_state(state["cost"])
        history.load_state(state["fleet"])
    except (KeyError, TypeError, ValueError) as error:
        logger.warning("ignoring the saved policy state: %s", error)
        return None
    return sts
