"""Relation scoring: an entity and a relation to scores of all entities (the form of TuckER), compressed in place."""

import torch
from torch import Tensor, nn

import compress_bilinear as cb


class LinkPredictor(nn.Module):
    """Indices of subjects (N,) and relations (N,) to scores of all objects (N, entities)."""

    def __init__(self, entities: int = 104, relations: int = 25) -> None:
        super().__init__()
        self.entity = nn.Embedding(entities, 64)
        self.relation = nn.Embedding(relations, 24)
        self.combine = nn.Bilinear(64, 24, 64, bias=False)

    def forward(self, subject: Tensor, relation: Tensor) -> Tensor:
        return self.combine(self.entity(subject), self.relation(relation)) @ self.entity.weight.T


def main() -> cb.Report:
    torch.manual_seed(0)
    model = LinkPredictor().eval()  # random here, so its errors are those of noise; yours comes trained
    batches = [{"subject": torch.randint(104, (128,)), "relation": torch.randint(25, (128,))} for _ in range(4)]
    plan = cb.plan(model, cb.TuckerConfig(rank=(32, 32, 16), quantize="int8"), calibration=batches)
    print(plan)  # nothing has changed yet
    model, report = plan.apply(inplace=True)
    assert model(**batches[0]).shape == (128, 104)
    return report


if __name__ == "__main__":
    main()
