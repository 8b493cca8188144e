"""ONNX files looked through without loading them, held to what the onnx package itself says of them."""

from contextlib import suppress

import numpy as np
import onnx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from deploy.errors import BundleError
from deploy.onnx_file import CHILDREN, FIELDS, read_onnx_facts
from tests.deploy.tiny_bundle import colour_graphs


def external(name: str) -> TensorProto:
    """A tensor whose values lie in another file."""
    tensor = TensorProto(name=name, data_type=TensorProto.FLOAT, dims=[2], data_location=TensorProto.EXTERNAL)
    tensor.external_data.add(key="location", value="/etc/passwd")
    return tensor


def model_of(*nodes: onnx.NodeProto, initializer: tuple[TensorProto, ...] = ()) -> onnx.ModelProto:
    graph = helper.make_graph(list(nodes), "graph", [], [], list(initializer))
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)])


def test_names_and_numbers_are_onnxs_own() -> None:
    messages = onnx.ModelProto.DESCRIPTOR.file.message_types_by_name
    for kind, children in CHILDREN.items():
        assert {number: messages[kind].fields_by_number[number].message_type.name for number in children} == children
    for kind, fields in FIELDS.items():
        assert {name: messages[kind].fields_by_name[name].number for name in fields} == fields
    assert TensorProto.EXTERNAL == 1


def test_no_way_to_a_tensor_or_an_operator_is_left_out() -> None:
    messages = onnx.ModelProto.DESCRIPTOR.file.message_types_by_name
    leads = {*CHILDREN, "TensorProto"}
    for kind, children in CHILDREN.items():
        fields = [field for field in messages[kind].fields if field.message_type is not None]
        ways = {field.number for field in fields if field.message_type.name in leads}
        assert ways == {number for number, child in children.items() if child != "StringStringEntryProto"}


def test_a_whole_graph_needs_nothing_and_tells_its_metadata() -> None:
    model = onnx.load_model_from_string(colour_graphs()[0])
    helper.set_model_props(model, {"labels": '["grün"]', "empty": ""})
    facts = read_onnx_facts(model.SerializeToString())
    assert (facts.external, facts.foreign) == ((), ())
    assert facts.metadata == {"labels": '["grün"]', "empty": ""}


def test_external_data_is_found_wherever_a_tensor_can_hide() -> None:
    inner = helper.make_graph([helper.make_node("Constant", [], ["c"], value=external("inner"))], "inner", [], [])
    sparse = onnx.SparseTensorProto(values=external("sparse"), dims=[2])
    model = model_of(
        helper.make_node("If", ["x"], ["y"], then_branch=inner, else_branch=inner),
        helper.make_node("Made", [], ["z"], tensors=[external("listed")]),
        initializer=(numpy_helper.from_array(np.zeros(2, np.float32), "own"), external("weight")),
    )
    model.graph.sparse_initializer.append(sparse)
    function = model.functions.add(name="f")
    function.node.append(helper.make_node("Constant", [], ["c"], value=external("in function")))
    model.training_info.add().algorithm.initializer.append(external("training"))
    found = set(read_onnx_facts(model.SerializeToString()).external)
    assert found == {"inner", "listed", "weight", "sparse", "in function", "training"}


def test_operators_outside_the_standard_are_found_in_every_branch() -> None:
    inner = helper.make_graph([helper.make_node("Gelu", ["x"], ["y"], domain="com.microsoft")], "inner", [], [])
    model = model_of(
        helper.make_node("Relu", ["x"], ["y"], domain="ai.onnx"),
        helper.make_node("If", ["x"], ["y"], then_branch=inner, else_branch=inner),
        helper.make_node("Steal", ["x"], ["y"], domain="org.evil"),
    )
    assert read_onnx_facts(model.SerializeToString()).foreign == ("com.microsoft:Gelu", "org.evil:Steal")


def test_a_graph_nested_a_thousand_deep_is_walked() -> None:
    data = helper.make_node("Steal", ["x"], ["y"], domain="org.evil").SerializeToString()
    for _ in range(1000):
        graph = field(6, field(1, data))  # AttributeProto.g holding GraphProto.node
        data = field(5, graph)  # NodeProto.attribute
    assert read_onnx_facts(field(7, field(1, data))).foreign == ("org.evil:Steal",)


def field(number: int, content: bytes) -> bytes:
    """A field of protobuf's wire format."""
    return bytes([number << 3 | 2]) + varint(len(content)) + content


def varint(value: int) -> bytes:
    head = bytearray()
    while value >= 0x80:
        head.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*head, value])


@given(st.binary(max_size=200))
def test_any_bytes_are_facts_or_a_clear_refusal(data: bytes) -> None:
    with suppress(BundleError):
        read_onnx_facts(data)


@given(cut=st.integers(0, 400), flipped=st.integers(0, 400), bit=st.integers(0, 7))
def test_a_damaged_graph_never_breaks_the_walk(cut: int, flipped: int, bit: int) -> None:
    data = bytearray(colour_graphs()[2])
    data[flipped % len(data)] ^= 1 << bit
    with suppress(BundleError):
        read_onnx_facts(bytes(data[: len(data) - cut]))


@pytest.mark.parametrize("data", [b"\x0a\x05ab", b"\x80", b"\x80" * 11, b"\x0b", b"\x09\x00"])
def test_what_ends_too_early_is_no_onnx_file(data: bytes) -> None:
    with pytest.raises(BundleError, match="ONNX file"):
        read_onnx_facts(data)
