"""Planted errors: each is put into an engine's process by ``EngineProcess(prepare=...)`` and must make a test fail."""

import wrapt


def shift_probabilities() -> None:
    """Hand the rejection sampler the q of the next position instead of the one each draft was drawn from."""

    def patch(module: object) -> None:
        proposer = module.DSparkProposer  # type: ignore[attr-defined]
        keep = proposer._keep_probabilities

        def shifted(self: object, q: object, *args: object) -> None:
            keep(self, None if q is None else q.roll(-1, dims=1), *args)  # type: ignore[attr-defined]

        proposer._keep_probabilities = shifted

    wrapt.register_post_import_hook(patch, "vllm_dspark.engine.v1")
