"""Together with the rest of diffusers: saving, offloading, LoRA, compiling, processors, precision."""

import copy
from pathlib import Path

import accelerate
import diffusers
import pytest
import torch
from conftest import assert_differ, assert_same, build_pipe, noise_picture
from diffusers import ControlNetModel, DiffusionPipeline, UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor2_0
from diffusers.utils import convert_state_dict_to_diffusers
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict

from evaluation.benchmark import compile_pipeline
from pipeline import ReferenceCache, Zero123PlusPipeline
from training.loss import NamedReferences


def test_save_and_reload_after_a_call(pipe, picture, run, tmp_path):
    before = run(pipe, picture)
    pipe.save_pretrained(tmp_path)
    assert (tmp_path / "pipeline.py").read_bytes() == Path("pipeline.py").read_bytes()
    again = Zero123PlusPipeline.from_pretrained(tmp_path)
    assert set(again.components) == set(pipe.components)
    assert_same(before, run(again, picture))


def test_optional_controlnet_is_saved_and_loaded(pipe, tmp_path):
    pipe.add_controlnet()
    pipe.save_pretrained(tmp_path)
    assert isinstance(Zero123PlusPipeline.from_pretrained(tmp_path).controlnet, ControlNetModel)


def test_what_is_no_component_is_kept_or_missed(pipe, picture, run, tmp_path, caplog):
    """A pipeline of another's components has its parameters too, or says that they are missing."""
    pipe.register_to_config(ramping_coefficients=[0.5] * 16, default_num_inference_steps=3)
    pipe.add_controlnet(conditioning_scale=0.75)
    caplog.clear()
    again = Zero123PlusPipeline(**pipe.components, **pipe.parameters)
    assert not caplog.records and again.parameters == pipe.parameters
    Zero123PlusPipeline(**pipe.components)
    assert "pass `**pipe.parameters` too" in caplog.text
    pipe.save_pretrained(tmp_path)
    again = Zero123PlusPipeline.from_pretrained(tmp_path)
    again.warned.add("background")
    options = {"control_image": noise_picture(3, (32, 48)), "num_inference_steps": 1}
    assert_same(run(again, picture, **options), run(pipe, picture, **options))
    assert again.config.controlnet_conditioning_scale == 0.75


def test_from_pipe_by_the_base_class(pipe, tmp_path):
    pipe.save_pretrained(tmp_path)
    source = {"custom_pipeline": str(tmp_path), "trust_remote_code": True}
    loaded = DiffusionPipeline.from_pretrained(tmp_path, **source)
    again = DiffusionPipeline.from_pipe(loaded, **source)
    assert again.unet is loaded.unet and again.controlnet is None
    loaded.add_controlnet()
    with pytest.raises(ValueError, match="pass `controlnet=pipe.controlnet`"):
        DiffusionPipeline.from_pipe(loaded, **source)
    assert DiffusionPipeline.from_pipe(loaded, controlnet=loaded.controlnet, **source).controlnet is loaded.controlnet


def test_a_lora_is_not_saved_as_modules(pipe, picture, run, tmp_path):
    pipe.unet.add_adapter(LoraConfig(r=2, lora_alpha=2, target_modules=["to_q"], init_lora_weights=False))
    computed = run(pipe, picture)
    with pytest.raises(ValueError, match="unload_lora_weights"):
        pipe.save_pretrained(tmp_path / "saved")
    assert not (tmp_path / "saved").exists()
    pipe.fuse_lora()
    pipe.unload_lora_weights()
    pipe.save_pretrained(tmp_path / "saved")
    again = Zero123PlusPipeline.from_pretrained(tmp_path / "saved")
    torch.testing.assert_close(run(again, picture), computed, rtol=1e-3, atol=1e-3)


def test_safety_checker_must_be_none(pipe):
    with pytest.raises(ValueError, match="`safety_checker`"):
        Zero123PlusPipeline(**{**pipe.components, "safety_checker": object()})


@pytest.mark.parametrize("how", ["model", "sequential", "leaf", "block"])
def test_offloading_changes_nothing(pipe, picture, run, how):
    before = run(pipe, picture)
    cpu = torch.device("cpu")
    if how == "model":
        pipe.enable_model_cpu_offload(device="cpu")
    elif how == "sequential":
        accelerate.cpu_offload(pipe.unet, execution_device=cpu)
    else:
        from diffusers import hooks

        options = {"leaf": {}, "block": {"num_blocks_per_group": 1}}[how]
        hooks.apply_group_offloading(pipe.unet, onload_device=cpu, offload_type=f"{how}_level", **options)
    assert_same(run(pipe, picture), before)


def test_attention_backend_is_honoured(pipe, picture, run):
    before = run(pipe, picture)
    pipe.unet.set_attention_backend("_native_math")
    processors = pipe.unet.attn_processors.values()
    assert {processor._attention_backend.value for processor in processors} == {"_native_math"}
    assert_same(run(pipe, picture), before)


def test_stock_processors_are_replaced(pipe, picture, run):
    before = run(pipe, picture)
    pipe.unet.set_attn_processor(AttnProcessor2_0())
    assert_same(before, run(pipe, picture))
    pipe.unet = UNet2DConditionModel.from_config(pipe.unet.config)
    assert_differ(run(pipe, noise_picture(0)), run(pipe, noise_picture(1)))


def test_text_is_projected_once_a_call(pipe, picture, run):
    calls = []
    layer = pipe.unet.mid_block.attentions[0].transformer_blocks[0].attn2
    layer.to_k.register_forward_hook(lambda *args: calls.append(1))
    run(pipe, picture)
    assert len(calls) == 1


def test_processors_that_lose_the_reference_are_refused(pipe, picture, run):
    pipe.unet.set_attention_slice(1)
    with pytest.raises(ValueError, match="SlicedAttnProcessor"):
        run(pipe, picture)


def test_attention_slicing_changes_nothing_and_can_be_undone(pipe, picture, run, caplog):
    before = run(pipe, picture)
    for _ in range(2):
        pipe.enable_attention_slicing()
    assert caplog.text.count("Attention slicing is not needed") == 1
    assert_same(run(pipe, picture), before)
    pipe.disable_attention_slicing()
    assert_same(run(pipe, picture), before)


def test_what_stable_diffusion_pipelines_can_do(pipe, picture, run):
    before = run(pipe, picture)
    pipe.enable_freeu(s1=0.6, s2=0.2, b1=1.4, b2=1.6)
    assert run(pipe, picture).isfinite().all()
    pipe.disable_freeu()
    pipe.fuse_qkv_projections(vae=False)
    with pytest.raises(ValueError, match="unfuse_qkv_projections"):
        run(pipe, picture)
    pipe.unfuse_qkv_projections(vae=False)
    assert_same(run(pipe, picture), before)


def test_own_processor_that_takes_the_reference_is_kept(pipe, picture, run):
    class Own:
        calls = 0

        def __init__(self, inner):
            self.inner = inner

        def __call__(self, attn, states, encoder_hidden_states=None, reference=None, reference_mode=None, **kwargs):
            Own.calls += 1
            kwargs |= {"reference": reference, "reference_mode": reference_mode}
            return self.inner(attn, states, encoder_hidden_states, **kwargs)

    before = run(pipe, picture)
    pipe.unet.set_attn_processor({name: Own(inner) for name, inner in pipe.unet.attn_processors.items()})
    assert_same(before, run(pipe, picture))
    assert Own.calls


def test_reading_what_was_not_written_is_an_error(pipe):
    sample, states = torch.randn(1, 4, 6, 4), torch.randn(1, 16, 128)
    for mode, words in (("read", "reference_mode='write'"), ("keep", "`reference_mode` is 'keep'")):
        with pytest.raises((RuntimeError, ValueError), match=words):
            pipe.unet(
                sample, 7, states, cross_attention_kwargs={"reference": ReferenceCache(), "reference_mode": mode}
            )


def test_vae_slicing_and_tiling(pipe, run):
    pictures = [noise_picture(0), noise_picture(1)]
    before = run(pipe, pictures, output_type="pt")
    pipe.vae.enable_slicing()
    assert_same(run(pipe, pictures, output_type="pt"), before)
    pipe.vae.enable_tiling()
    assert run(pipe, pictures, output_type="pt").shape == before.shape


def test_lora(pipe, picture, run, tmp_path):
    before = run(pipe, picture)
    pipe.unet.add_adapter(
        LoraConfig(r=2, lora_alpha=2, target_modules=["to_q", "to_k", "to_v"], init_lora_weights=False)
    )
    with_lora = run(pipe, picture)
    assert_differ(before, with_lora)
    layers = convert_state_dict_to_diffusers(get_peft_model_state_dict(pipe.unet))
    pipe.save_lora_weights(tmp_path, unet_lora_layers=layers)
    pipe.unload_lora_weights()
    assert_same(before, run(pipe, picture))
    pipe.load_lora_weights(tmp_path, weight_name="pytorch_lora_weights.safetensors")  # older diffusers, offline
    assert_same(run(pipe, picture), with_lora)
    assert_same(run(pipe, picture, cross_attention_kwargs={"scale": 0.0}), before)
    pipe.fuse_lora()
    torch.testing.assert_close(run(pipe, picture), with_lora, rtol=1e-3, atol=1e-3)
    pipe.unfuse_lora()
    pipe.unload_lora_weights()
    torch.testing.assert_close(run(pipe, picture), before, rtol=1e-3, atol=1e-3)


def test_gradient_checkpointing_gives_the_same_gradients(pipe):
    reference, tile, states = torch.randn(2, 4, 4, 4), torch.randn(2, 4, 6, 4), torch.randn(2, 16, 128)

    def gradients(unet):
        cache = NamedReferences()
        unet(reference, 7, states, cross_attention_kwargs={"reference": cache, "reference_mode": "write"})
        out = unet(tile, 7, states, cross_attention_kwargs={"reference": cache, "reference_mode": "read"}).sample
        out.square().mean().backward()
        return {name: parameter.grad for name, parameter in unet.named_parameters()}

    plain, checkpointed = pipe.unet.train(), copy.deepcopy(pipe.unet)
    checkpointed.enable_gradient_checkpointing()
    expected, ours = gradients(plain), gradients(checkpointed)
    assert expected["down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_k.weight"].abs().sum() > 0
    for name in expected:
        torch.testing.assert_close(ours[name], expected[name], rtol=1e-4, atol=1e-6, msg=name)


def test_bfloat16(pipe, picture, run):
    result = run(pipe.to(torch.bfloat16), picture)
    assert result.dtype == torch.bfloat16 and result.isfinite().all()


def test_int8_weights_by_torchao(pipe, picture, run, tmp_path):
    torchao = pytest.importorskip("torchao.quantization")
    from diffusers import quantizers

    weights = diffusers.TorchAoConfig(torchao.Int8WeightOnlyConfig())
    config = quantizers.PipelineQuantizationConfig(quant_mapping={"unet": weights})
    before = run(pipe, picture)
    pipe.save_pretrained(tmp_path)
    small = type(pipe).from_pretrained(tmp_path, quantization_config=config, trust_remote_code=True)
    small.set_progress_bar_config(disable=True)
    layer = small.unet.mid_block.attentions[0].transformer_blocks[0].attn1.to_q
    assert type(layer.weight).__name__ == "Int8Tensor"
    result = run(small, picture)
    assert 0 < (result - before).norm() / before.norm() < 0.1


@pytest.mark.slow
def test_compile_makes_one_graph_for_writing_and_one_for_reading(run):
    """Tracing the recipe of docs/speed.md gives two graphs for the UNet and one for the decoder, and none more for
    another picture.
    """
    torch._dynamo.reset()
    pipe = build_pipe(channels=(32,))  # tracing a larger UNet takes long
    before = run(pipe, noise_picture(0), num_inference_steps=3)
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    compile_pipeline(pipe, backend=backend)
    assert_same(run(pipe, noise_picture(0), num_inference_steps=3), before)
    run(pipe, noise_picture(1), seed=1, num_inference_steps=3)
    assert len(graphs) == 2
    run(pipe, noise_picture(1), output_type="pt", num_inference_steps=3)
    assert len(graphs) == 3
