"""What pipelines of videos and of sound pass to their denoisers."""

from __future__ import annotations

import functools

from diffusers.schedulers.scheduling_minimax_h3 import MiniMaxH3Scheduler

from tests.helpers.denoisers.passed.timesteps import (
    CAST,
    CAST_INPUT,
    DATA,
    DISCRETE,
    EXPAND,
    EXPAND_INPUT,
    LOG_SIGMA,
    SIGMA,
    AtanScheduler,
    Passed,
    passed,
)

VIDEOS: dict[str, list[Passed]] = {
    "AceStepTransformer1DModel": [
        passed(
            "ace_step/pipeline_ace_step",
            "current_timestep = float(t_sched)",
            "t_curr_tensor = current_timestep * torch.ones((batch_size,), device=device, dtype=dtype)",
            "timestep=t_curr_tensor",
            scheduler=SIGMA,
        ),
    ],
    "AllegroTransformer3DModel": [
        passed("allegro/pipeline_allegro", EXPAND_INPUT, "timestep=timestep", scheduler=DISCRETE),
    ],
    "AnyFlowFARTransformer3DModel": [
        passed(
            "anyflow/pipeline_anyflow_far",
            f"{EXPAND_INPUT}.unsqueeze(-1)",
            "timestep = timestep.repeat((1, latent_model_input.shape[1]))",
            "timestep=timestep",
        ),
    ],
    "AnyFlowTransformer3DModel": [
        passed(
            "anyflow/pipeline_anyflow",
            f"{EXPAND_INPUT}.unsqueeze(-1)",
            "timestep = timestep.repeat((1, latent_model_input.shape[1]))",
            "timestep=timestep",
        ),
    ],
    "AudioLDM2UNet2DConditionModel": [
        passed("audioldm2/pipeline_audioldm2", "t", scheduler=DISCRETE),
    ],
    "ChronoEditTransformer3DModel": [
        passed("chronoedit/pipeline_chronoedit", EXPAND, "timestep=timestep"),
    ],
    "ConsisIDTransformer3DModel": [
        passed("consisid/pipeline_consisid", EXPAND_INPUT, "timestep=timestep", scheduler=DISCRETE),
    ],
    "Cosmos3OmniTransformer": [
        passed(
            "cosmos/pipeline_cosmos3_omni",
            "timestep = t.item()",
            "vision_timesteps = torch.full((num_noisy_vision_tokens,), timestep, device=device)",
            "vision_timesteps=vision_timesteps",
        ),
    ],
    "EasyAnimateTransformer3DModel": [
        passed(
            "easyanimate/pipeline_easyanimate",
            "t_expand = torch.tensor([t] * latent_model_input.shape[0], device=device)"
            ".to(dtype=latent_model_input.dtype)",
            "t_expand",
        ),
        passed(
            "easyanimate/pipeline_easyanimate_control",
            "t_expand = torch.tensor([t] * latent_model_input.shape[0], device=device)"
            ".to(dtype=latent_model_input.dtype)",
            "t_expand",
        ),
        passed(
            "easyanimate/pipeline_easyanimate_inpaint",
            "t_expand = torch.tensor([t] * latent_model_input.shape[0], device=device)"
            ".to(dtype=latent_model_input.dtype)",
            "t_expand",
        ),
    ],
    "HeliosTransformer3DModel": [
        passed("helios/pipeline_helios", EXPAND, "timestep=timestep"),
        passed("helios/pipeline_helios_pyramid", f"{EXPAND}.to(torch.int64)", "timestep=timestep"),
    ],
    "HunyuanVideo15Transformer3DModel": [
        passed("hunyuan_video1_5/pipeline_hunyuan_video1_5", CAST_INPUT, "timestep=timestep"),
        passed("hunyuan_video1_5/pipeline_hunyuan_video1_5_image2video", CAST_INPUT, "timestep=timestep"),
    ],
    "HunyuanVideoFramepackTransformer3DModel": [
        passed("hunyuan_video/pipeline_hunyuan_video_framepack", EXPAND, "timestep=timestep"),
    ],
    "I2VGenXLUNet": [
        passed("deprecated/i2vgen_xl/pipeline_i2vgen_xl", "t", scheduler=DISCRETE),
    ],
    "JoyImageEditPlusTransformer3DModel": [
        passed("joyimage/pipeline_joyimage_edit_plus", "t_expand = t.repeat(batch_size)", "timestep=t_expand"),
    ],
    "JoyImageEditTransformer3DModel": [
        passed(
            "joyimage/pipeline_joyimage_edit", "t_expand = t.repeat(latent_model_input.shape[0])", "timestep=t_expand"
        ),
    ],
    "Kandinsky5Transformer3DModel": [
        passed(
            "kandinsky5/pipeline_kandinsky",
            "timestep = t.unsqueeze(0).repeat(batch_size * num_videos_per_prompt)",
            "timestep=timestep.to(dtype)",
        ),
        passed(
            "kandinsky5/pipeline_kandinsky_i2i",
            "timestep = t.unsqueeze(0).repeat(batch_size * num_images_per_prompt)",
            "timestep=timestep.to(dtype)",
        ),
        passed(
            "kandinsky5/pipeline_kandinsky_i2v",
            "timestep = t.unsqueeze(0).repeat(batch_size * num_videos_per_prompt)",
            "timestep=timestep.to(dtype)",
        ),
        passed(
            "kandinsky5/pipeline_kandinsky_t2i",
            "timestep = t.unsqueeze(0).repeat(batch_size * num_images_per_prompt)",
            "timestep=timestep.to(dtype)",
        ),
    ],
    "Kandinsky6SRTransformer3DModel": [
        passed("kandinsky6/pipeline_kandinsky6_sr", "timestep=t.expand(latents.shape[0])"),
    ],
    "Kandinsky6Transformer3DModel": [
        passed("kandinsky6/pipeline_kandinsky6_ti2va", "timestep = t.expand(batch_size)", "timestep=timestep"),
    ],
    "LTX2VideoTransformer3DModel": [
        passed("ltx2/pipeline_ltx2", EXPAND_INPUT, "timestep=timestep"),
        passed(
            "ltx2/pipeline_ltx2_image2video",
            EXPAND_INPUT,
            "video_timestep = timestep.unsqueeze(-1) * (1 - conditioning_mask)",
            "timestep=video_timestep",
        ),
        passed(
            "ltx2/pipeline_ltx2_condition",
            EXPAND_INPUT,
            "video_timestep = timestep.unsqueeze(-1) * (1 - conditioning_mask.squeeze(-1))",
            "timestep=video_timestep",
        ),
    ],
    "LatteTransformer3DModel": [
        passed(
            "latte/pipeline_latte",
            "current_timestep = t",
            "current_timestep = current_timestep[None].to(latent_model_input.device)",
            "current_timestep = current_timestep.expand(latent_model_input.shape[0])",
            "timestep=current_timestep",
            scheduler=DISCRETE,
        ),
    ],
    "LongCatAudioDiTTransformer": [
        passed(
            "longcat_audio_dit/pipeline_longcat_audio_dit",
            "curr_t = (t / self.scheduler.config.num_train_timesteps).expand(batch_size).to(dtype=prompt_embeds.dtype)",
            "timestep=curr_t",
        ),
    ],
    "MiniMaxH3Transformer3DModel": [
        passed(
            "modular minimax_h3/before_denoise",
            "row_timesteps = torch.full((sequence_length,), video_timestep, dtype=torch.float32)",
            "row_timesteps[video_indices[:num_condition_video_rows]] = condition_video_timestep",
            "row_timesteps",
            scheduler=functools.partial(MiniMaxH3Scheduler, shift=3.0),
        ),
    ],
    "MiniMaxMusic3Transformer1DModel": [
        passed("modular minimax_music3/denoise", CAST, "timestep=timestep", scheduler=DATA),
    ],
    "MotifVideoTransformer3DModel": [
        passed("motif_video/pipeline_motif_video", EXPAND, "timestep=timestep"),
        passed("motif_video/pipeline_motif_video_image2video", EXPAND, "timestep=timestep"),
    ],
    "SanaVideoTransformer3DModel": [
        passed("sana_video/pipeline_sana_video", EXPAND_INPUT, "timestep=timestep"),
        passed(
            "sana_video/pipeline_sana_video_i2v",
            "timestep = t.expand(conditioning_mask.shape)",
            "timestep = timestep * (1 - conditioning_mask)",
            "timestep=timestep",
        ),
    ],
    "SanaWMLTX2RefinerTransformer3DModel": [
        passed(
            "sana_wm/refiner",
            "sigma = float(sigmas_t[i].item())",
            "timestep = torch.full((batch_size, seq_len), sigma * float(transformer_config.timestep_scale_multiplier), "
            "dtype=torch.float32, device=device)",
            "timestep=timestep",
        ),
    ],
    "SanaWMTransformer3DModel": [
        passed(
            "sana_wm/pipeline_sana_wm",
            "timestep = t.expand(cond_mask_input.shape).float()",
            "timestep = torch.min(timestep, (1.0 - cond_mask_input) * 1000.0)",
            "timestep[:, :1, :, 0, 0]",
        ),
    ],
    "SkyReelsV2Transformer3DModel": [
        passed("skyreels_v2/pipeline_skyreels_v2", EXPAND, "timestep=timestep"),
        passed("skyreels_v2/pipeline_skyreels_v2_i2v", EXPAND, "timestep=timestep"),
    ],
    "StableAudio3DiTModel": [
        passed("stable_audio_3/pipeline_stable_audio_3", "t.expand(latent_model_input.shape[0])", scheduler=SIGMA),
    ],
    "StableAudioDiTModel": [
        passed("stable_audio/pipeline_stable_audio", "t.unsqueeze(0)", scheduler=AtanScheduler),
    ],
    "UNetSpatioTemporalConditionModel": [
        passed("stable_video_diffusion/pipeline_stable_video_diffusion", "t", scheduler=LOG_SIGMA),
    ],
    "WanAnimate2Transformer3DModel": [
        passed("modular wan_animate_2/denoise", "timestep = torch.stack([t])", "timestep=timestep"),
    ],
    "WanAnimateTransformer3DModel": [
        passed("wan/pipeline_wan_animate", EXPAND, "timestep=timestep"),
    ],
    "WanVACETransformer3DModel": [
        passed("wan/pipeline_wan_vace", EXPAND, "timestep=timestep"),
    ],
}
