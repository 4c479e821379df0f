import itertools

import pytest
import torch
from support import DTYPES, SHAPES, Memory, assert_matches_reference
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from compress_bilinear import ops
from compress_bilinear.errors import InputError
from compress_bilinear.ops import _choice
from compress_bilinear.quantization import FORMATS

RANK = (4, 5, 6)


def normal(*shape, dtype=torch.float64):
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


def factors(kind, shape, dtype=torch.float64):
    """The tensors of a layer of `shape` (I, J, O), its bias last."""
    in1, in2, out = shape
    if kind == "cp":
        tensors = [normal(7, in1), normal(7, in2), normal(out, 7), normal(out)]
    else:
        tensors = [normal(RANK[1], in1), normal(RANK[2], in2), normal(*RANK), normal(out, RANK[0]), normal(out)]
    return [tensor.to(dtype) for tensor in tensors]


def reference(kind, pairs, x1, x2, *tensors):
    name = ("pairwise_" if pairs else "bilinear_") + kind
    in1, in2, *core, out, bias = tensors
    return getattr(ops.reference, name)(x1, x2, *core, (out, in1.mT, in2.mT), bias)


def call(kind, pairs, *args, **options):
    return getattr(ops, ("pairwise_" if pairs else "bilinear_") + kind)(*args, **options)


def inputs(pairs, shape, dtype=torch.float64):
    leading = ((2, 3), (2, 5)) if pairs else ((2, 3), (2, 3))
    return [normal(*lead, size).to(dtype) for lead, size in zip(leading, shape[:2], strict=True)]


WAYS = [("cp", False), ("cp", True), ("tucker", False), ("tucker", True)]
NO_SMALL_CALLS = ops.Tuning(onednn_products=0)  # for which a CP has a path of its own
# every shape with every way, every dtype with each of both
PATHS = [
    (shape, DTYPES[(row + column) % 4], *way, tuning)
    for row, shape in enumerate(SHAPES)
    for column, (way, tuning) in enumerate([(WAYS[0], NO_SMALL_CALLS), *((way, ops.Tuning()) for way in WAYS)])
]


@pytest.mark.parametrize(("shape", "dtype", "kind", "pairs", "tuning"), PATHS)
def test_composed_paths_have_the_references_outputs_and_gradients(shape, dtype, kind, pairs, tuning):
    tensors = [t.requires_grad_() for t in (*inputs(pairs, shape, dtype), *factors(kind, shape, dtype))]
    wide = [t.detach().double().requires_grad_() for t in tensors]
    with ops.use_tuning(tuning):
        found, expected = call(kind, pairs, *tensors), reference(kind, pairs, *wide)
        with torch.no_grad():
            values = call(kind, pairs, *tensors)
    factor = 10 if dtype in (torch.float16, torch.bfloat16) else 1  # three roundings in a row
    assert_matches_reference(found.detach(), expected.detach(), factor)
    assert_matches_reference(values, expected.detach(), factor)
    direction = normal(*found.shape).to(dtype)
    ours = torch.autograd.grad(found, tensors, direction)
    for gradient, exact in zip(ours, torch.autograd.grad(expected, wide, direction.double()), strict=True):
        assert_matches_reference(gradient, exact, factor)


@pytest.mark.parametrize(("kind", "pairs"), WAYS)
def test_first_and_second_derivatives(kind, pairs):
    shape = (3, 2, 2)
    tensors = [t.requires_grad_() for t in (*inputs(pairs, shape), *factors(kind, shape))]
    assert torch.autograd.gradcheck(lambda *args: call(kind, pairs, *args), tensors)
    assert torch.autograd.gradgradcheck(lambda *args: call(kind, pairs, *args), tensors, fast_mode=True)


@pytest.mark.parametrize("most", [1, 10, 40, 150, 500])  # elements: from single pairs to several of the batch
@pytest.mark.parametrize(("leading", "length1", "length2"), [((), 13, 3), ((3,), 4, 5), ((2, 3), 3, 4), ((7,), 1, 1)])
def test_pairs_in_blocks_are_the_same(leading, length1, length2, most):
    shape = (7, 5, 9)
    input1, input2 = normal(*leading, length1, 7), normal(*leading, length2, 5)
    tensors = [t.requires_grad_() for t in (input1, input2, *factors("cp", shape))]
    whole = ops.pairwise_cp(*tensors)
    with ops.use_tuning(ops.Tuning(cp=most, cp_grad=most)):
        blocks = ops.pairwise_cp(*tensors)
        with torch.no_grad():
            values = ops.pairwise_cp(*tensors)
    assert_matches_reference(blocks.detach(), whole.detach())
    assert_matches_reference(values, whole.detach())
    for ours, exact in zip(*(torch.autograd.grad(y.sum(), tensors) for y in (blocks, whole)), strict=True):
        assert_matches_reference(ours, exact)


@pytest.mark.parametrize("leading", [(40,), (4, 10)])
def test_pairs_without_a_gradient_hold_their_output_the_projections_and_a_few_blocks(leading):
    rank, length, out = 64, 12, 5
    weights = [normal(*shape) for shape in ((rank, 9), (rank, 9), (out, rank), (out,))]
    input1, input2 = normal(*leading, length, 9), normal(*leading, length, 9)
    with Memory() as memory, torch.no_grad(), ops.use_tuning(ops.Tuning(cp=2**12)):
        ops.pairwise_cp(input1, input2, *weights)
    output, projected = 40 * length**2 * out, 40 * length * rank
    assert memory.largest == max(output, projected)
    assert memory.peak <= output + 2 * projected + 5 * 2**12
    assert memory.peak < 40 * length**2 * rank  # all products


@pytest.mark.parametrize("wanted", [False, True])
def test_more_outputs_than_components_are_held_little_more_than_once_or_twice(wanted):
    weights = [normal(*shape) for shape in ((4, 9), (4, 9), (64, 4), (64,))]
    weights[0].requires_grad_(wanted)
    input1, input2 = normal(6, 32, 9), normal(6, 32, 9)
    output = 6 * 32**2 * 64
    for most, copies in ((2**22, 1), (2**12, 2 if wanted else 1)):  # pieces are joined where a gradient is wanted
        with Memory() as memory, torch.set_grad_enabled(wanted), ops.use_tuning(ops.Tuning(cp=most, cp_grad=most)):
            ops.pairwise_cp(input1, input2, *weights)
        assert output <= memory.peak < (copies + 0.3) * output


class OnlyLinear(torch.Tensor):
    """A weight with no operator but a linear layer's, as quantized ones are."""

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        plain = [arg.as_subclass(torch.Tensor) if isinstance(arg, cls) else arg for arg in args]
        if function is not torch.nn.functional.linear and "__get__" not in str(function):
            raise NotImplementedError(str(function))
        return function(*plain, **(kwargs or {}))


def test_weights_of_another_type_need_no_more_than_linear_layers():
    input1, input2, *weights = *inputs(True, (7, 5, 9)), *factors("cp", (7, 5, 9))
    exact = reference("cp", True, input1, input2, *weights)
    others = [weight.as_subclass(OnlyLinear) for weight in weights[:3]]
    with torch.no_grad(), ops.use_tuning(ops.Tuning(cp=10)):
        assert_matches_reference(ops.pairwise_cp(input1, input2, *others, weights[3]), exact)


@pytest.mark.parametrize("enabled", [False, True])
@pytest.mark.parametrize("most", [2**20, 10])
def test_pairs_have_autocasts_dtype_with_and_without_a_gradient(most, enabled):
    input1, input2, *weights = [t.float() for t in (*inputs(True, (7, 5, 9)), *factors("cp", (7, 5, 9)))]
    for first in (input1, input1.double()):
        with (
            ops.use_tuning(ops.Tuning(cp=most)),
            torch.set_grad_enabled(enabled),
            torch.autocast("cpu", torch.bfloat16),
        ):
            wide = [t.double() if first.dtype == torch.float64 else t for t in (weights[0], weights[2])]
            assert ops.pairwise_cp(first, input2, wide[0], weights[1], *weights[2:3]).dtype == torch.bfloat16


@pytest.mark.parametrize("kind", ["cp", "tucker"])
@pytest.mark.parametrize("pairs", [False, True])
def test_graphs_export_compile_and_vmap(kind, pairs):
    shape = (7, 5, 3)
    tensors = (*inputs(pairs, shape), *factors(kind, shape))

    class Layer(torch.nn.Module):
        def forward(self, *args):
            return call(kind, pairs, *args)

    expected = reference(kind, pairs, *tensors)
    compiled = torch.compile(Layer(), fullgraph=True, backend="aot_eager")
    assert_matches_reference(compiled(*tensors), expected)
    assert_matches_reference(torch.export.export(Layer(), tensors).module()(*tensors), expected)
    x1, x2, *rest = tensors
    mapped = torch.func.vmap(lambda x1, x2: call(kind, pairs, x1, x2, *rest))(x1, x2)
    assert_matches_reference(mapped, expected)


CASES = [(kind, pairs) for kind in ("dense", "cp", "tucker") for pairs in (False, True)]
WITH_KERNEL = [("dense", False), ("cp", False)]  # which take a `backend`


def operands_of(kind, pairs, shape, dtype=torch.float64):
    in1, in2, out = shape
    rest = [normal(out, in1, in2), normal(out)] if kind == "dense" else factors(kind, shape)
    return [tensor.to(dtype) for tensor in (*inputs(pairs, shape), *rest)]


@pytest.mark.parametrize("sizes", [(7, 5, 3), (37, 33, 70), (1100, 1000, 2)])  # few entries, more, and in blocks
@pytest.mark.parametrize(("kind", "pairs"), CASES)
def test_autocast_has_its_way_as_with_a_matrix_product(kind, pairs, sizes):
    tensors = operands_of(kind, pairs, sizes, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        found = call(kind, pairs, *tensors)
        asked = call(kind, pairs, *tensors, **({"backend": "composed"} if (kind, pairs) in WITH_KERNEL else {}))
    assert found.dtype == asked.dtype == torch.bfloat16
    wide = [tensor.double() for tensor in tensors]
    expected = call(kind, pairs, *wide)
    assert_matches_reference(found, expected, 2)
    assert_matches_reference(asked, expected, 2)
    with torch.autocast("cpu", torch.bfloat16):
        assert call(kind, pairs, *wide).dtype == torch.float64
        assert call(kind, pairs, *(tensor.bfloat16() for tensor in tensors)).dtype == torch.bfloat16


class OnTheDevice(TorchDispatchMode):
    """Lets no operator give a tensor of another device than meta, as one that is copied to a GPU would be."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        found = func(*args, **(kwargs or {}))
        assert {t.device.type for t in tree_leaves(found) if isinstance(t, torch.Tensor)} <= {"meta"}, func
        return found


def stored_in_int8(kind, tensors):
    """The operands with their weights in int8, as the layers hold them, and the option that has the scales of a CP."""
    x1, x2, *rest, bias = tensors
    values = [FORMATS["int8"].zeros(t.shape, "weight" if t.dim() == 3 else "factor", t.device) for t in rest]
    return (x1, x2, *values, bias), {"sigma": torch.ones(len(rest[0]), device=x1.device)} if kind == "cp" else {}


@pytest.mark.parametrize("int8", [False, True])
@pytest.mark.parametrize("backend", [None, "composed", "triton"])
@pytest.mark.parametrize(("kind", "pairs"), CASES)
def test_no_value_is_looked_at_so_graphs_can_be_captured(kind, pairs, backend, int8, monkeypatch):
    # tensors without values: reading one, or a size that depends on one, would raise here, and on CUDA wait for it
    monkeypatch.setattr(_choice, "reason_against_triton", lambda device, dtype: None)
    tensors = [t.to("meta").requires_grad_() for t in operands_of(kind, pairs, (70, 50, 30), torch.float32)]
    arguments, options = stored_in_int8(kind, tensors) if int8 else (tensors, {})
    if backend and ((kind, pairs) not in WITH_KERNEL or (kind == "dense" and int8 and backend == "triton")):
        return  # which have no kernel
    with OnTheDevice():
        found = call(kind, pairs, *arguments, **({"backend": backend} if backend else {}), **options)
        wanted = [t for t in arguments if isinstance(t, torch.Tensor) and t.requires_grad]
        gradients = torch.autograd.grad(found.sum(), wanted)
    assert [gradient.shape for gradient in gradients] == [tensor.shape for tensor in wanted]


class Layer(torch.nn.Module):
    def __init__(self, kind, pairs):
        super().__init__()
        self.kind, self.pairs = kind, pairs

    def forward(self, *tensors):
        return call(self.kind, self.pairs, *tensors)


@pytest.mark.parametrize(("kind", "pairs"), CASES)
def test_an_exported_graph_holds_for_other_numbers_of_rows(kind, pairs):
    x1, x2, *rest = operands_of(kind, pairs, (7, 5, 3))
    rows = torch.export.Dim("rows")
    dynamic = {"tensors": ({0: rows}, {0: rows}, *({} for _ in rest))}
    program = torch.export.export(Layer(kind, pairs), (x1, x2, *rest), dynamic_shapes=dynamic)
    more = [torch.cat([x, x, x[:1]]) for x in (x1, x2)]
    assert_matches_reference(program.module()(*more, *rest), call(kind, pairs, *more, *rest))


@pytest.mark.parametrize("kind", ["dense", "cp"])
@pytest.mark.parametrize("backend", [None, "triton"])
def test_on_a_gpu_a_graph_has_the_kernels_operator_only_on_request(kind, backend):
    pytest.importorskip("triton")

    class Asked(torch.nn.Module):
        def forward(self, *tensors):
            return call(kind, False, *tensors, backend=backend)

    tensors = operands_of(kind, False, (64, 48, 32), torch.bfloat16)
    rows = torch.export.Dim("rows")
    dynamic = {"tensors": ({0: rows}, {0: rows}, *({} for _ in tensors[2:]))}
    with FakeTensorMode():  # which knows a GPU's tensors without a GPU
        fake = tuple(torch.empty(tensor.shape, dtype=tensor.dtype, device="cuda") for tensor in tensors)
        program = torch.export.export(Asked(), fake, dynamic_shapes=dynamic)
    targets = {str(node.target) for node in program.graph.nodes}
    name = {"dense": "dense", "cp": "cp_product"}[kind]
    assert (f"compress_bilinear.{name}.default" in targets) == (backend == "triton")


GPU = torch.device("cuda")
UNMEASURED = "the kernel has not been measured, and runs only on request"


@pytest.mark.parametrize(
    ("method", "options", "reason"),
    [
        ("dense", {}, UNMEASURED),
        ("cp", {}, UNMEASURED),
        ("cp", {"dtype": torch.float16}, UNMEASURED),
        ("dense", {"dtype": torch.float16}, "overflow in float16"),
        ("dense", {"dtype": torch.float64}, "inputs are torch.float64"),
        ("dense", {"reason_against": "it has hooks"}, "it has hooks"),
        ("dense", {"rows": 0}, "no rows"),
        ("dense", {"pairs": True}, "the only one for pairs"),
        ("cp", {"pairs": True}, "the only one for pairs"),
        ("tucker", {}, "the only one for a Tucker layer"),
    ],
)
def test_what_is_against_a_kernel_is_explained(method, options, reason, monkeypatch):
    monkeypatch.setattr(_choice, "HAS_TRITON", True)
    monkeypatch.setattr(_choice, "reason_against_gpu", lambda index: None)
    assert reason in ops.explain(method, GPU, **({"dtype": torch.bfloat16} | options))


@pytest.mark.parametrize(
    ("capability", "version", "reason"),
    [
        ((9, 0), (3, 8), "Triton before 3.9 compiles the kernels wrongly for compute capability 9.0"),
        ((9, 0), (0, 0), "Triton before 3.9"),  # of a build that does not say its version
        ((9, 0), (3, 9), None),
        ((9, 0), (4, 0), None),
        ((8, 6), (3, 6), None),
        ((10, 0), (3, 6), None),
        ((7, 5), (3, 9), "need compute capability 8.0, and the device has 7.5"),
        (None, (3, 9), "finds no GPU"),
    ],
)
def test_a_gpu_or_a_triton_that_would_compute_wrongly_is_refused(capability, version, reason, monkeypatch):
    monkeypatch.setattr(_choice, "HAS_TRITON", True)
    monkeypatch.setattr(_choice, "_capability", lambda index: capability)
    monkeypatch.setattr(_choice, "_triton_version", lambda: version)
    assert (reason or UNMEASURED) in ops.explain("dense", GPU, torch.bfloat16)


def test_the_installed_version_of_triton_is_read():
    triton = pytest.importorskip("triton")
    assert ".".join(map(str, _choice._triton_version())) == ".".join(triton.__version__.split(".")[:2])


def test_int8_factors_have_the_step_of_the_format():
    shape = (7, 150, 9)
    x1, x2 = inputs(False, shape, torch.float32)
    in1, in2, core, out, bias = factors("tucker", shape, torch.float32)
    stored = FORMATS["int8"].encode(core, "weight")
    values = [FORMATS["int8"].encode(0.9 * t / t.abs().max(), "factor") for t in (in1, in2, out)]
    wide = [value.qdata.double() / 128 for value in values]
    found = ops.bilinear_tucker(x1, x2, *values[:2], stored, values[2], bias)
    exact = stored.decode(torch.float64)
    expected = reference("tucker", False, x1.double(), x2.double(), *wide[:2], exact, wide[2], bias.double())
    assert_matches_reference(found, expected)


def test_a_backend_that_cannot_run_is_an_error_with_the_reason():
    tensors = (*inputs(False, (7, 5, 3)), *factors("cp", (7, 5, 3)))
    with pytest.raises(InputError, match=r"None or one of .* Found 'cuda'\."):
        ops.bilinear_cp(*tensors, backend="cuda")
    with pytest.raises(InputError, match=r"inputs are on cpu|not installed"):
        ops.bilinear_cp(*tensors, backend="triton")
    assert_matches_reference(ops.bilinear_cp(*tensors, backend="composed"), ops.bilinear_cp(*tensors))


@pytest.mark.parametrize(
    "leading", [((2,), (3,)), ((1,), (3,)), ((3,), ()), ((1, 2), (2, 1)), ((5, 1), (1, 1)), ((2, 3), (3, 2))]
)
@pytest.mark.parametrize("kind", ["dense", "cp", "tucker"])
@pytest.mark.parametrize("out", [1, 9])  # a small dense call has a way for each
def test_inputs_of_other_leading_dimensions_are_an_error_and_never_broadcast(kind, leading, out):
    shape = (7, 5, out)
    x1, x2 = (normal(*lead, size) for lead, size in zip(leading, shape[:2], strict=True))
    rest = (normal(out, 7, 5),) if kind == "dense" else factors(kind, shape)
    with pytest.raises(InputError, match="same leading dimensions"):
        call(kind, False, x1, x2, *rest)


def test_sizes_whose_products_agree_are_not_taken_for_the_weights():
    with pytest.raises(InputError, match=r"`input1` should have shape \(\.\.\., 3\)"):  # 2 x 6 entries, as of 3 x 4
        ops.bilinear_dense(normal(3, 2), normal(3, 6), normal(5, 3, 4))
    for shape1, shape2 in itertools.permutations([(1, 8), (4, 2), (2, 4), (8,), (2, 2, 2)], 2):  # 8 entries each
        with pytest.raises(InputError, match="same leading dimensions"):
            ops.bilinear_dense(normal(*shape1), normal(*shape2), normal(5, 4, 4))


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("traced", [False, True])
@pytest.mark.parametrize("leading", [(3,), (2, 3), (3000,)], ids=str)
def test_products_of_inputs_do_not_overflow_in_float16(leading, traced, autocast):
    dtype = torch.float32 if autocast else torch.float16
    x1, x2 = (torch.full((*leading, size), 300, dtype=dtype) for size in (4, 5))
    weight = (1e-3 * normal(20, 4, 5)).to(dtype)
    run = torch.compile(ops.bilinear_dense, fullgraph=True, backend="eager") if traced else ops.bilinear_dense
    with torch.autocast("cpu", torch.float16, enabled=autocast):
        found = run(x1, x2, weight)
    exact = ops.reference.bilinear_dense(x1.double(), x2.double(), weight.double())
    assert found.dtype == torch.float16
    torch.testing.assert_close(found.double(), exact, rtol=1e-2, atol=1)


def test_a_weight_is_floating_or_stored_and_has_three_dimensions():
    x1, x2, weight = torch.randn(4, 5), torch.randn(4, 6), torch.randn(7, 5, 6)
    for call in (
        ops.bilinear_dense,
        ops.pairwise_dense,
        lambda a, b, core: ops.bilinear_tucker(a, b, None, None, core, None),
    ):
        with pytest.raises(InputError, match=r"floating or a `QuantizedTensor`. Found torch.int8"):
            call(x1, x2, weight.to(torch.int8))
        with pytest.raises(InputError, match="three dimensions"):
            call(x1, x2, weight[0])
