"""Subject fine-tuning of image models: images, captions, caches, losses, metrics."""

from nara_diffusion.dreambooth.caches import LatentCache, PromptCache
from nara_diffusion.dreambooth.dataset import DreamBoothDataset, TrainingSample, collate_samples
from nara_diffusion.dreambooth.image_records import ImageRecord, class_records, load_image
from nara_diffusion.dreambooth.samples import generate_class_images
from nara_diffusion.dreambooth.source_images import records_from_folder

__all__ = [
    "DreamBoothDataset",
    "ImageRecord",
    "LatentCache",
    "PromptCache",
    "TrainingSample",
    "class_records",
    "collate_samples",
    "generate_class_images",
    "load_image",
    "records_from_folder",
]
