"""The solvers that are compared, each as a call from a weight to a CP or a Tucker decomposition.

A decomposition is a head and three factors: the components' weights (R,) or the core (R_o, R_i, R_j), then (O, R_o),
(I, R_i), (J, R_j). Libraries are imported where they are used, for a process measures one contestant only.
"""

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from benchmarks.weights import Rank3
from compress_bilinear import MaxError, decomposition

Parts = tuple[Tensor, tuple[Tensor, Tensor, Tensor]]
SAMPLES = 40  # rows of the Khatri-Rao product that randomised_parafac draws, for each component


@dataclass(frozen=True)
class Contestant:
    """A solver and how it is called.

    Attributes:
        name: a key of `CP`, `TUCKER` or `MAX_ERROR`.
        method: "cp", "tucker" or "max_error".
        sweeps: of a CP solver that is told how many.
        fraction: of the time of the faster TensorLy start, as a budget for ours; `max_seconds` is what that came to.
        target: the error to meet, for "max_error".
    """

    name: str
    method: str
    sweeps: int = 100
    fraction: float | None = None
    max_seconds: float | None = None
    target: float | None = None
    seed: int = 0

    @property
    def setting(self) -> str:
        """How it is called, in a word."""
        if self.target is not None:
            return f"MaxError({self.target})"
        if self.method == "cp" and self.name != "ours":
            return f"{self.sweeps} sweeps"
        return "default" if self.fraction is None else f"{self.fraction:.2g}x"


def solver(contestant: Contestant, weight: Tensor, rank: Any) -> Callable[[], Parts]:
    """The call to time; whatever converts the weight to a library's own tensors happens here, before it."""
    table = {"cp": CP, "tucker": TUCKER, "max_error": MAX_ERROR}[contestant.method]
    return table[contestant.name](contestant, weight, rank)


def _ours_cp(contestant: Contestant, weight: Tensor, rank: int) -> Callable[[], Parts]:
    budget: dict[str, Any] = {} if contestant.max_seconds is None else {"max_seconds": contestant.max_seconds}

    def call() -> Parts:
        found = decomposition.cp(weight, rank, seed=contestant.seed, **budget)
        return found.weights, found.factors

    return call


def _tensorly_cp(init: str) -> Callable[[Contestant, Tensor, int], Callable[[], Parts]]:
    def prepare(contestant: Contestant, weight: Tensor, rank: int) -> Callable[[], Parts]:
        parafac = _tensorly().parafac
        options = {"n_iter_max": contestant.sweeps, "tol": 0, "init": init, "random_state": contestant.seed}
        return lambda: _parts(parafac(weight, rank, **options))

    return prepare


def _sampled_cp(contestant: Contestant, weight: Tensor, rank: int) -> Callable[[], Parts]:
    parafac = _tensorly().randomised_parafac
    options = {"n_iter_max": contestant.sweeps, "tol": 0, "max_stagnation": 0, "random_state": contestant.seed}
    return lambda: _parts(parafac(weight, rank, SAMPLES * rank, **options))


def _pyttb_cp(contestant: Contestant, weight: Tensor, rank: int) -> Callable[[], Parts]:
    import numpy as np

    pyttb = import_module("pyttb")
    tensor = pyttb.tensor(weight.numpy())

    def call() -> Parts:
        np.random.seed(contestant.seed)
        found = pyttb.cp_als(tensor, rank, stoptol=0, maxiters=contestant.sweeps, printitn=0)[0]
        return _parts((found.weights, found.factor_matrices))

    return call


def _ours_tucker(contestant: Contestant, weight: Tensor, rank: Rank3) -> Callable[[], Parts]:
    def call() -> Parts:
        found = decomposition.tucker(weight, rank)
        return found.core, found.factors

    return call


def _tensorly_tucker(svd: str, backend: str = "pytorch") -> Callable[[Contestant, Tensor, Rank3], Callable[[], Parts]]:
    def prepare(contestant: Contestant, weight: Tensor, rank: Rank3) -> Callable[[], Parts]:
        tucker = _tensorly(backend).tucker
        values = weight.numpy() if backend == "numpy" else weight
        return lambda: _parts(tucker(values, rank, svd=svd, random_state=contestant.seed))

    return prepare


def _pyttb_hosvd(contestant: Contestant, weight: Tensor, rank: Rank3) -> Callable[[], Parts]:
    import numpy as np

    pyttb = import_module("pyttb")
    tensor = pyttb.tensor(weight.numpy())

    def call() -> Parts:  # the tolerance is not used where ranks are given
        found = pyttb.hosvd(tensor, 1e-4, verbosity=0, ranks=np.array(rank))
        return _parts((found.core.data, found.factor_matrices))

    return call


def _pyttb_hooi(contestant: Contestant, weight: Tensor, rank: Rank3) -> Callable[[], Parts]:
    import numpy as np

    pyttb = import_module("pyttb")
    tensor = pyttb.tensor(weight.numpy())

    def call() -> Parts:
        np.random.seed(contestant.seed)
        found = pyttb.tucker_als(tensor, np.array(rank), maxiters=100, printitn=0)[0]
        return _parts((found.core.data, found.factor_matrices))

    return call


def _ours_max_error(contestant: Contestant, weight: Tensor, rank: None) -> Callable[[], Parts]:
    target = MaxError(contestant.target or 0.5)

    def call() -> Parts:
        found = decomposition.tucker(weight, target)
        return found.core, found.factors

    return call


def _st_hosvd(contestant: Contestant, weight: Tensor, rank: None) -> Callable[[], Parts]:
    """The textbook way (Vannieuwenhoven, Vandebril, Meerbergen, 2012): truncate mode by mode, a third of e² in each."""

    def call() -> Parts:
        core, factors = weight.double(), []
        allowed = (contestant.target or 0.5) ** 2 / 3 * float(core.square().sum())
        for mode in range(3):
            unfolded = core.movedim(mode, 0).flatten(1)
            values, vectors = torch.linalg.eigh(unfolded @ unfolded.T)  # ascending
            dropped = min(int((values.clamp(min=0).cumsum(0) <= allowed).sum()), len(values) - 1)
            factor = vectors[:, dropped:].flip(1)
            core = torch.tensordot(core.movedim(mode, 0), factor, ([0], [0])).movedim(-1, mode)
            factors.append(factor.to(weight.dtype))
        return _parts((core.to(weight.dtype), factors))

    return call


def _tensorly(backend: str = "pytorch") -> Any:
    import tensorly
    import tensorly.decomposition

    tensorly.set_backend(backend)
    return tensorly.decomposition


def _parts(found: Any) -> Parts:
    head, factors = found
    out, in1, in2 = (_torch(factor) for factor in factors)
    return _torch(head), (out, in1, in2)


def _torch(array: Any) -> Tensor:
    if isinstance(array, Tensor):
        return array
    import numpy as np

    return torch.as_tensor(np.ascontiguousarray(array))  # torch takes no reversed axes


CP: dict[str, Callable[..., Callable[[], Parts]]] = {
    "ours": _ours_cp,
    "TensorLy random": _tensorly_cp("random"),
    "TensorLy svd": _tensorly_cp("svd"),
    "TensorLy sampled": _sampled_cp,
    "pyttb cp_als": _pyttb_cp,
}
TUCKER: dict[str, Callable[..., Callable[[], Parts]]] = {
    "ours": _ours_tucker,
    "TensorLy": _tensorly_tucker("truncated_svd"),
    "TensorLy numpy": _tensorly_tucker("truncated_svd", "numpy"),  # its default backend, on most shapes the slower
    "TensorLy randomized": _tensorly_tucker("randomized_svd"),
    "pyttb hosvd": _pyttb_hosvd,
    "pyttb tucker_als": _pyttb_hooi,
}
MAX_ERROR: dict[str, Callable[..., Callable[[], Parts]]] = {"ours": _ours_max_error, "ST-HOSVD": _st_hosvd}
