"""One block of a Llama, as people read it after canonicalization."""

from __future__ import annotations

BLOCK = """
  attention
    %0.attention.rms_norm: f32[batch, sequence, 32] = aten.rms_norm(%embedding, normalized_shape=[32], weight=@model.layers.0.input_layernorm.weight, eps=1e-06)
    %0.attention.linear: f32[batch, sequence, 32] = aten.linear(%0.attention.rms_norm, weight=@model.layers.0.self_attn.q_proj.weight)
    %0.attention.reshape: f32[batch, sequence, 4, 8] = aten.reshape(%0.attention.linear, shape=[%sym_size, %sym_size_2, -1, 8])
    %0.attention.transpose: f32[batch, 4, sequence, 8] = aten.transpose.int(%0.attention.reshape, dim0=1, dim1=2)
    %0.attention.linear_2: f32[batch, sequence, 16] = aten.linear(%0.attention.rms_norm, weight=@model.layers.0.self_attn.k_proj.weight)
    %0.attention.reshape_2: f32[batch, sequence, 2, 8] = aten.reshape(%0.attention.linear_2, shape=[%sym_size, %sym_size_2, -1, 8])
    %0.attention.transpose_2: f32[batch, 2, sequence, 8] = aten.transpose.int(%0.attention.reshape_2, dim0=1, dim1=2)
    %0.attention.linear_3: f32[batch, sequence, 16] = aten.linear(%0.attention.rms_norm, weight=@model.layers.0.self_attn.v_proj.weight)
    %0.attention.reshape_3: f32[batch, sequence, 2, 8] = aten.reshape(%0.attention.linear_3, shape=[%sym_size, %sym_size_2, -1, 8])
    %0.attention.transpose_3: f32[batch, 2, sequence, 8] = aten.transpose.int(%0.attention.reshape_3, dim0=1, dim1=2)
    %0.attention.rotary_embedding: f32[batch, 4, sequence, 8] = lamella.rotary_embedding(%0.attention.transpose, cos=%unsqueeze_8, sin=%unsqueeze_9)
    %0.attention.rotary_embedding_2: f32[batch, 2, sequence, 8] = lamella.rotary_embedding(%0.attention.transpose_2, cos=%unsqueeze_8, sin=%unsqueeze_9)
    %0.attention.scaled_dot_product_attention: f32[batch, 4, sequence, 8] = aten.scaled_dot_product_attention(%0.attention.rotary_embedding, key=%0.attention.rotary_embedding_2, value=%0.attention.transpose_3, attn_mask=%logical_and, scale=0.3535533905932738, enable_gqa=True)
    %0.attention.transpose_4: f32[batch, sequence, 4, 8] = aten.transpose.int(%0.attention.scaled_dot_product_attention, dim0=1, dim1=2)
    %0.attention.reshape_4: f32[batch, sequence, 32] = aten.reshape(%0.attention.transpose_4, shape=[%sym_size, %sym_size_2, -1])
    %0.attention.linear_4: f32[batch, sequence, 32] = aten.linear(%0.attention.reshape_4, weight=@model.layers.0.self_attn.o_proj.weight)
  %0.add: f32[batch, sequence, 32] = aten.add.Tensor(%embedding, other=%0.attention.linear_4)
  mlp
    %0.mlp.rms_norm: f32[batch, sequence, 32] = aten.rms_norm(%0.add, normalized_shape=[32], weight=@model.layers.0.post_attention_layernorm.weight, eps=1e-06)
    %0.mlp.linear: f32[batch, sequence, 64] = aten.linear(%0.mlp.rms_norm, weight=@model.layers.0.mlp.gate_proj.weight)
    %0.mlp.silu: f32[batch, sequence, 64] = aten.silu(%0.mlp.linear)
    %0.mlp.linear_2: f32[batch, sequence, 64] = aten.linear(%0.mlp.rms_norm, weight=@model.layers.0.mlp.up_proj.weight)
    %0.mlp.mul: f32[batch, sequence, 64] = aten.mul.Tensor(%0.mlp.silu, other=%0.mlp.linear_2)
    %0.mlp.linear_3: f32[batch, sequence, 32] = aten.linear(%0.mlp.mul, weight=@model.layers.0.mlp.down_proj.weight)
  %0.add_2: f32[batch, sequence, 32] = aten.add.Tensor(%0.add, other=%0.mlp.linear_3)
"""  # noqa: E501


def test_a_block_of_llama_is_what_people_would_write(captured) -> None:
    text = str(captured("llama"))
    start, stop = text.index("block 0"), text.index("block 1")
    _, _, block = text[start:stop].partition("\n")
    assert block.strip("\n") == BLOCK.strip("\n")
