"""LoRA by peft on a compressed layer stored in 4 bits (QLoRA): trained on stored factors, merged into floating ones."""

import warnings
from tempfile import TemporaryDirectory

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import Linear
from torch import Tensor, nn

import compress_bilinear as cb
from compress_bilinear.modules import QuantizedLinear


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
    small, report = cb.compress(model, cb.CPConfig(rank=64, quantize="nf4"), calibration=batches)
    print(report)

    def loss_of(network: nn.Module) -> Tensor:
        errors = [nn.functional.mse_loss(network(*batch), task(*batch).detach()) for batch in batches]
        return torch.stack(errors).mean()

    task = Net()  # stands for new data: what the network is to do from now on
    before = loss_of(small).item()
    config = LoraConfig(r=4, lora_alpha=8, target_modules=["in1_proj", "in2_proj", "out_proj"])
    # without `quantize` the factors are `nn.Linear` layers, which peft knows and merges into at once
    config._register_custom_module({QuantizedLinear: Linear})
    warnings.filterwarnings("ignore", "Unsupported layer type")  # peft's, of every class that is registered so
    adapted = get_peft_model(small, config)
    adapted.print_trainable_parameters()
    optimizer = torch.optim.Adam([p for p in adapted.parameters() if p.requires_grad], lr=3e-3)
    for _ in range(60):
        loss = loss_of(adapted)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with TemporaryDirectory() as folder:
        adapted.save_pretrained(folder)
        floating = cb.dequantize(adapted.unload())  # the same values, in layers that peft can merge into
        merged = PeftModel.from_pretrained(floating, folder).merge_and_unload()
    final = cb.quantize(merged, "nf4")  # the same CPBilinear, of the same size, with better factors
    after, floating_after = loss_of(final).item(), loss_of(merged).item()
    print(
        f"Mean squared error on the new task: {before:.5f} before, {after:.5f} after, {floating_after:.5f} in float32"
    )
    assert isinstance(final.fusion, cb.CPBilinear)
    assert after < before
    return report


if __name__ == "__main__":
    main()
