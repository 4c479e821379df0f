"""A model of transformers with a bilinear layer: compressed, then saved and loaded as any other of its models."""

from tempfile import TemporaryDirectory

import torch
from torch import Tensor, nn
from transformers import BertConfig, BertModel, BertPreTrainedModel

import compress_bilinear as cb


class Relations(cb.PretrainedMixin, BertPreTrainedModel):  # type: ignore[misc]  # which mypy does not read
    """Tokens (N, L) and the places of two entities (N,), (N,) to logits of their relation (N, 24).

    `PretrainedMixin` is all that is added for the compressed layer.
    """

    def __init__(self, config: BertConfig) -> None:
        super().__init__(config)
        self.bert = BertModel(config)
        self.relation = nn.Bilinear(config.hidden_size, config.hidden_size, config.num_labels)
        self.post_init()

    def forward(self, input_ids: Tensor, head: Tensor, tail: Tensor) -> Tensor:
        tokens, rows = self.bert(input_ids).last_hidden_state, torch.arange(len(input_ids))
        return self.relation(tokens[rows, head], tokens[rows, tail])


def main() -> cb.Report:
    torch.manual_seed(0)
    sizes = BertConfig(
        vocab_size=500, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, num_labels=24
    )
    model = Relations(sizes).eval()  # yours comes trained

    def batch() -> dict[str, Tensor]:
        head, tail = torch.randint(0, 12, (2, 64))
        return {"input_ids": torch.randint(0, 500, (64, 12)), "head": head, "tail": tail}

    config = cb.AutoConfig(size=1 / 8)
    small, report = cb.compress(model, config, calibration=[batch() for _ in range(8)])
    print(report)

    held_out = batch()
    with TemporaryDirectory() as folder, torch.no_grad():
        small.save_pretrained(folder)
        again = Relations.from_pretrained(folder)
        assert torch.equal(again(**held_out), small(**held_out))
    print(f"Loaded with a {type(again.relation).__name__}, {again.relation.quantize}")
    return report


if __name__ == "__main__":
    main()
