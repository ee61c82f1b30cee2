"""What to verify and whether to draft: calibration, cost, scheduling and the policy. numpy only, no torch, no vllm."""
