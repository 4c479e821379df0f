"""LoRA by peft on a compressed layer: its factors are `nn.Linear` layers, adapted, trained and merged as any other."""

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

import compress_bilinear as cb


class Net(nn.Module):
    """Two inputs (N, 32), (N, 32) to outputs (N, 24)."""

    def __init__(self) -> None:
        super().__init__()
        self.fusion = nn.Bilinear(32, 32, 24)

    def forward(self, x1: Tensor, x2: Tensor) -> Tensor:
        return self.fusion(x1, x2)


def main() -> cb.Report:
    torch.manual_seed(0)
    model = Net()  # yours comes trained
    batches = [(torch.randn(64, 32), torch.randn(64, 32)) for _ in range(8)]
    small, report = cb.compress(model, cb.CPConfig(rank=64), calibration=batches)
    print(report)

    def loss_of(network: nn.Module) -> Tensor:
        errors = [nn.functional.mse_loss(network(*batch), task(*batch).detach()) for batch in batches]
        return torch.stack(errors).mean()

    task = Net()  # stands for new data: what the network is to do from now on
    before = loss_of(small).item()
    adapted = get_peft_model(small, LoraConfig(r=4, lora_alpha=8, target_modules=["in1_proj", "in2_proj", "out_proj"]))
    adapted.print_trainable_parameters()
    optimizer = torch.optim.Adam([p for p in adapted.parameters() if p.requires_grad], lr=3e-3)
    for _ in range(60):
        loss = loss_of(adapted)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    merged = adapted.merge_and_unload()  # the same CPBilinear, of the same size, with better factors
    after = loss_of(merged).item()
    print(f"Mean squared error on the new task: {before:.5f} before, {after:.5f} after")
    assert isinstance(merged.fusion, cb.CPBilinear)
    assert after < before
    return report


if __name__ == "__main__":
    main()
