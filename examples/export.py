"""Exporting: a compressed network by torch.export, and as ONNX, which onnxruntime runs with the same outputs."""

import onnxruntime
import torch
from torch import Tensor, nn

import compress_bilinear as cb


class Net(nn.Module):
    """Two views (N, 32), (N, 32) to class logits (N, 10)."""

    def __init__(self) -> None:
        super().__init__()
        self.fusion, self.head = nn.Bilinear(32, 32, 32), nn.Linear(32, 10)

    def forward(self, top: Tensor, bottom: Tensor) -> Tensor:
        return self.head(torch.relu(self.fusion(top, bottom)))


def main() -> cb.Report:
    torch.manual_seed(0)
    model = Net().eval()  # yours comes trained
    batches = [(torch.randn(64, 32), torch.randn(64, 32)) for _ in range(4)]
    small, report = cb.compress(model, cb.TuckerConfig(rank=(16, 20, 20), quantize="int8"), calibration=batches)
    print(report)

    rows = torch.export.Dim("rows", min=1, max=4096)
    exported = torch.export.export(small, batches[0], dynamic_shapes={"top": {0: rows}, "bottom": {0: rows}})
    inputs = torch.randn(7, 32), torch.randn(7, 32)  # another number of rows
    expected = small(*inputs).detach()
    torch.testing.assert_close(exported.module()(*inputs), expected)

    program = torch.onnx.export(exported, verbose=False)
    assert program is not None
    file = program.model_proto.SerializeToString()  # or program.save("net.onnx")
    session = onnxruntime.InferenceSession(file)
    names = (given.name for given in session.get_inputs())
    (output,) = session.run(None, {name: value.numpy() for name, value in zip(names, inputs, strict=True)})
    found = torch.as_tensor(output)
    torch.testing.assert_close(found, expected)
    print(f"ONNX: {len(file)} bytes; outputs differ by at most {(found - expected).abs().max():.1g}")
    return report


if __name__ == "__main__":
    main()
