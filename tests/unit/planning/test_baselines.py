"""The front of a layer, after its replacement has been trained."""

import compress_bilinear as cb
from compress_bilinear.planning import _baselines as baselines


def test_training_renews_the_errors_that_the_chosen_one_had():
    points = [baselines.point(cb.CPBilinear(3, 3, 2, rank), 0.5, 0.4, chosen=rank == 2) for rank in (1, 2)]
    points.append(baselines.point(cb.CPBilinear(3, 3, 2, 3), None, 0.4, chosen=True))
    found = baselines.renewed(points, 0.6, 0.1)
    assert [(one.weight_error, one.output_error) for one in found] == [(0.5, 0.4), (0.6, 0.1), (None, 0.1)]
