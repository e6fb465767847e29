"""What pipelines of images pass to their denoisers."""

from __future__ import annotations

from diffusers.schedulers.scheduling_ddpm_wuerstchen import DDPMWuerstchenScheduler

from tests.helpers.denoisers.passed.timesteps import (
    CAST,
    DATA,
    DISCRETE,
    EXPAND,
    EXPAND_INPUT,
    FROM_ONE,
    Passed,
    passed,
)

IMAGES: dict[str, list[Passed]] = {
    "BriaFibo2Transformer2DModel": [
        passed("bria_fibo2/pipeline_bria_fibo2", f"{EXPAND} / 1000", "timestep=timestep"),
    ],
    "BriaFiboTransformer2DModel": [
        passed(
            "bria_fibo/pipeline_bria_fibo",
            f"{EXPAND_INPUT}.to(device=latent_model_input.device, dtype=latent_model_input.dtype)",
            "timestep=timestep",
        ),
        passed(
            "bria_fibo/pipeline_bria_fibo_edit",
            f"{EXPAND_INPUT}.to(device=latent_model_input.device, dtype=latent_model_input.dtype)",
            "timestep=timestep",
        ),
    ],
    "BriaTransformer2DModel": [
        passed("bria/pipeline_bria", EXPAND_INPUT, "timestep=timestep"),
    ],
    "CogView3PlusTransformer2DModel": [
        passed("cogview3/pipeline_cogview3plus", EXPAND_INPUT, "timestep=timestep", scheduler=DISCRETE),
    ],
    "DiTTransformer2DModel": [
        passed(
            "dit/pipeline_dit",
            "timesteps = t",
            "timesteps = timesteps[None].to(latent_model_input.device)",
            "timesteps = timesteps.expand(latent_model_input.shape[0])",
            "timestep=timesteps",
            scheduler=DISCRETE,
        ),
    ],
    "DreamLiteUNetModel": [
        passed("dreamlite/pipeline_dreamlite", "timestep=t.expand(model_input.shape[0]).to(latents.dtype)"),
        passed("dreamlite/pipeline_dreamlite_mobile", "timestep=t.expand(model_input.shape[0]).to(latents.dtype)"),
    ],
    "ErnieImageTransformer2DModel": [
        passed(
            "ernie_image/pipeline_ernie_image",
            "t_batch = torch.full((total_batch_size * 2,), t.item(), device=device, dtype=dtype)",
            "timestep=t_batch",
        ),
    ],
    "Flux3Transformer2DModel": [
        passed(
            "modular flux3/denoise", "timestep = (t / 1000).expand(batch_size).to(latents.dtype)", "timestep=timestep"
        ),
    ],
    "GlmImageTransformer2DModel": [
        passed("glm_image/pipeline_glm_image", f"{EXPAND} - 1", "timestep=timestep", scheduler=FROM_ONE),
    ],
    "HunyuanImageTransformer2DModel": [
        passed("hunyuan_image/pipeline_hunyuanimage", CAST, "timestep=timestep"),
        passed("hunyuan_image/pipeline_hunyuanimage_refiner", CAST, "timestep=timestep"),
    ],
    "Ideogram4Transformer2DModel": [
        passed("ideogram4/pipeline_ideogram4", "t_model = 1.0 - t.float() / num_train_timesteps", "timestep=t_model"),
    ],
    "Kandinsky3UNet": [
        passed("kandinsky3/pipeline_kandinsky3", "t", scheduler=DISCRETE),
    ],
    "LongCatImageTransformer2DModel": [
        passed("longcat_image/pipeline_longcat_image", CAST, "timestep=timestep / 1000"),
    ],
    "NucleusMoEImageTransformer2DModel": [
        passed(
            "nucleusmoe_image/pipeline_nucleusmoe_image",
            CAST,
            "timestep=timestep / self.scheduler.config.num_train_timesteps",
        ),
    ],
    "OmniGenTransformer2DModel": [
        passed("omnigen/pipeline_omnigen", EXPAND_INPUT, "timestep=timestep", scheduler=DATA),
    ],
    "OvisImageTransformer2DModel": [
        passed("ovis_image/pipeline_ovis_image", CAST, "timestep=timestep / 1000"),
    ],
    "PRXTransformer2DModel": [
        passed(
            "prx/pipeline_prx",
            "t_cont = (t.float() / self.scheduler.config.num_train_timesteps).view(1).repeat(2).to(device)",
            "timestep=t_cont",
        ),
        passed(
            "prx/pipeline_prx_pixel",
            "t_cont = (t.float() / self.scheduler.config.num_train_timesteps).view(1).repeat(2).to(device)",
            "timestep=t_cont",
        ),
    ],
    "PriorTransformer": [
        passed("kandinsky2_2/pipeline_kandinsky2_2_prior", "timestep=t", scheduler=DISCRETE),
    ],
    "QwenImage21Transformer2DModel": [
        passed("qwenimage21/pipeline_qwenimage21", CAST, "timestep=timestep / 1000"),
    ],
    "StableCascadeUNet": [
        passed(
            "stable_cascade/pipeline_stable_cascade",
            "timestep_ratio = t.expand(latents.size(0)).to(dtype)",
            "timestep_ratio=torch.cat([timestep_ratio] * 2) if self.do_classifier_free_guidance else timestep_ratio",
            scheduler=DDPMWuerstchenScheduler,
        ),
        passed(
            "stable_cascade/pipeline_stable_cascade_prior",
            "timestep_ratio = t.expand(latents.size(0)).to(dtype)",
            "timestep_ratio=torch.cat([timestep_ratio] * 2) if self.do_classifier_free_guidance else timestep_ratio",
            scheduler=DDPMWuerstchenScheduler,
        ),
    ],
    "UNetControlNetXSModel": [
        passed("deprecated/controlnet_xs/pipeline_controlnet_xs", "timestep=t", scheduler=DISCRETE),
    ],
    "WuerstchenDiffNeXt": [
        passed(
            "deprecated/wuerstchen/pipeline_wuerstchen",
            "ratio = t.expand(latents.size(0)).to(dtype)",
            "r=torch.cat([ratio] * 2) if self.do_classifier_free_guidance else ratio",
            scheduler=DDPMWuerstchenScheduler,
        ),
    ],
    "WuerstchenPrior": [
        passed(
            "deprecated/wuerstchen/pipeline_wuerstchen_prior",
            "ratio = t.expand(latents.size(0)).to(dtype)",
            "r=torch.cat([ratio] * 2) if self.do_classifier_free_guidance else ratio",
            scheduler=DDPMWuerstchenScheduler,
        ),
    ],
}
