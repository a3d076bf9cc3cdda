"""Three tiny graphs as they are printed after preparation and after quantization: what a reader of the code should have in mind."""

from __future__ import annotations

import re

from expecttest import assert_expected_inline
from nets import prepared
from test_insert_fake_quant import quantized


def printed(gm) -> str:
    text = re.sub(r" : \[num_users=\d+\] =", " =", str(gm.graph)).strip()
    return re.sub(r", kwargs = \{\}\)", ")", text)


def test_chain():
    assert_expected_inline(
        printed(prepared("chain")),
        """\
graph():
    %input_1 = placeholder[target=input]
    %_0 = call_module[target=0](args = (%input_1,))
    %_2 = call_module[target=2](args = (%_0,))
    %_4 = call_module[target=4](args = (%_2,))
    %_6 = call_module[target=6](args = (%_4,))
    %_7_0 = call_module[target=7.0](args = (%_6,))
    %_7_1 = call_module[target=7.1](args = (%_7_0,))
    %_7_3 = call_module[target=7.3](args = (%_7_1,))
    return _7_3""",
    )
    assert_expected_inline(
        printed(quantized("chain")[2]),
        """\
graph():
    %input_1 = placeholder[target=input]
    %_0 = call_module[target=0](args = (%input_1,))
    %_2 = call_module[target=2](args = (%_0,))
    %activations__2 = call_module[target=activations._2](args = (%_2,))
    %_4 = call_module[target=4](args = (%activations__2,))
    %_6 = call_module[target=6](args = (%_4,))
    %activations__6 = call_module[target=activations._6](args = (%_6,))
    %_7_0 = call_module[target=7.0](args = (%activations__6,))
    %_7_1 = call_module[target=7.1](args = (%_7_0,))
    %_7_3 = call_module[target=7.3](args = (%_7_1,))
    return _7_3""",
    )


def test_residual():
    assert_expected_inline(
        printed(prepared("residual")),
        """\
graph():
    %x = placeholder[target=x]
    %stem_0 = call_module[target=stem.0](args = (%x,))
    %stem_2 = call_module[target=stem.2](args = (%stem_0,))
    %stem_3 = call_module[target=stem.3](args = (%stem_2,))
    %layers_0_conv1 = call_module[target=layers.0.conv1](args = (%stem_3,))
    %layers_0_relu = call_module[target=layers.0.relu](args = (%layers_0_conv1,))
    %layers_0_conv2 = call_module[target=layers.0.conv2](args = (%layers_0_relu,))
    %add = call_function[target=operator.add](args = (%layers_0_conv2, %stem_3))
    %layers_0_relu_1 = call_module[target=layers.0.relu_1](args = (%add,))
    %layers_1_conv1 = call_module[target=layers.1.conv1](args = (%layers_0_relu_1,))
    %layers_1_relu = call_module[target=layers.1.relu](args = (%layers_1_conv1,))
    %layers_1_conv2 = call_module[target=layers.1.conv2](args = (%layers_1_relu,))
    %layers_1_downsample_0 = call_module[target=layers.1.downsample.0](args = (%layers_0_relu_1,))
    %add_1 = call_function[target=operator.add](args = (%layers_1_conv2, %layers_1_downsample_0))
    %layers_1_relu_1 = call_module[target=layers.1.relu_1](args = (%add_1,))
    %fc_0 = call_module[target=fc.0](args = (%layers_1_relu_1,))
    %fc_1 = call_module[target=fc.1](args = (%fc_0,))
    %fc_3 = call_module[target=fc.3](args = (%fc_1,))
    return fc_3""",
    )
    assert_expected_inline(
        printed(quantized("residual")[2]),
        """\
graph():
    %x = placeholder[target=x]
    %stem_0 = call_module[target=stem.0](args = (%x,))
    %stem_2 = call_module[target=stem.2](args = (%stem_0,))
    %activations_stem_2 = call_module[target=activations.stem_2](args = (%stem_2,))
    %stem_3 = call_module[target=stem.3](args = (%activations_stem_2,))
    %layers_0_conv1 = call_module[target=layers.0.conv1](args = (%stem_3,))
    %layers_0_relu = call_module[target=layers.0.relu](args = (%layers_0_conv1,))
    %activations_layers_0_relu = call_module[target=activations.layers_0_relu](args = (%layers_0_relu,))
    %layers_0_conv2 = call_module[target=layers.0.conv2](args = (%activations_layers_0_relu,))
    %add = call_function[target=operator.add](args = (%layers_0_conv2, %stem_3))
    %layers_0_relu_1 = call_module[target=layers.0.relu_1](args = (%add,))
    %activations_layers_0_relu_1 = call_module[target=activations.layers_0_relu_1](args = (%layers_0_relu_1,))
    %layers_1_conv1 = call_module[target=layers.1.conv1](args = (%activations_layers_0_relu_1,))
    %layers_1_relu = call_module[target=layers.1.relu](args = (%layers_1_conv1,))
    %activations_layers_1_relu = call_module[target=activations.layers_1_relu](args = (%layers_1_relu,))
    %layers_1_conv2 = call_module[target=layers.1.conv2](args = (%activations_layers_1_relu,))
    %layers_1_downsample_0 = call_module[target=layers.1.downsample.0](args = (%activations_layers_0_relu_1,))
    %add_1 = call_function[target=operator.add](args = (%layers_1_conv2, %layers_1_downsample_0))
    %layers_1_relu_1 = call_module[target=layers.1.relu_1](args = (%add_1,))
    %activations_layers_1_relu_1 = call_module[target=activations.layers_1_relu_1](args = (%layers_1_relu_1,))
    %fc_0 = call_module[target=fc.0](args = (%activations_layers_1_relu_1,))
    %fc_1 = call_module[target=fc.1](args = (%fc_0,))
    %fc_3 = call_module[target=fc.3](args = (%fc_1,))
    return fc_3""",
    )


def test_norm_act():
    assert_expected_inline(
        printed(prepared("norm_act")),
        """\
graph():
    %input_1 = placeholder[target=input]
    %pad = call_function[target=torch.nn.functional.pad](args = (%input_1, (0, 1, 0, 1)), kwargs = {mode: constant, value: 0})
    %_0 = call_module[target=0](args = (%pad,))
    %_1_act = call_module[target=1_act](args = (%_0,))
    %_2 = call_module[target=2](args = (%_1_act,))
    %_3 = call_module[target=3](args = (%_2,))
    %_3_act = call_module[target=3_act](args = (%_3,))
    %_4 = call_module[target=4](args = (%_3_act,))
    %_6_0 = call_module[target=6.0](args = (%_4,))
    %_6_1 = call_module[target=6.1](args = (%_6_0,))
    %_6_3 = call_module[target=6.3](args = (%_6_1,))
    return _6_3""",
    )
    assert_expected_inline(
        printed(quantized("norm_act")[2]),
        """\
graph():
    %input_1 = placeholder[target=input]
    %pad = call_function[target=torch.nn.functional.pad](args = (%input_1, (0, 1, 0, 1)), kwargs = {mode: constant, value: 0})
    %_0 = call_module[target=0](args = (%pad,))
    %_1_act = call_module[target=1_act](args = (%_0,))
    %activations__1_act = call_module[target=activations._1_act](args = (%_1_act,))
    %_2 = call_module[target=2](args = (%activations__1_act,))
    %_3 = call_module[target=3](args = (%_2,))
    %_3_act = call_module[target=3_act](args = (%_3,))
    %activations__3_act = call_module[target=activations._3_act](args = (%_3_act,))
    %_4 = call_module[target=4](args = (%activations__3_act,))
    %activations__4 = call_module[target=activations._4](args = (%_4,))
    %_6_0 = call_module[target=6.0](args = (%activations__4,))
    %_6_1 = call_module[target=6.1](args = (%_6_0,))
    %_6_3 = call_module[target=6.3](args = (%_6_1,))
    return _6_3""",
    )
