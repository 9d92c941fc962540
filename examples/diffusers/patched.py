"""A pipeline of diffusers that takes no embeds, Ideogram 4 or DreamLite: it asks the service where it would encode."""

from collections.abc import Sequence

from common import DTYPES, arguments, client, sampling
from diffusers import DiffusionPipeline

TEXT_COMPONENTS = ("text_encoder", "tokenizer", "processor")


def main(argv: Sequence[str] | None = None) -> None:
    options = arguments(__doc__, None, "picture.png", argv)
    config = DiffusionPipeline.load_config(options.model)
    absent = [name for name in TEXT_COMPONENTS if name in config]
    pipe = DiffusionPipeline.from_pretrained(options.model, dtype=DTYPES[options.dtype], **dict.fromkeys(absent))
    pipe.to(options.device)
    with client(options) as service:
        service.patch(pipe)
        call = {"height": options.size, "width": options.size} | sampling(options)
        if options.negative is not None:
            call["negative_prompt"] = options.negative  # Ideogram 4 takes none
        if options.guidance is not None and config["_class_name"] == "Ideogram4Pipeline":
            call["guidance_schedule"] = None  # instead of its default, which is for 48 steps
        output = pipe(prompt=options.prompt, **call)
    output.images[0].save(options.output)


if __name__ == "__main__":
    main()
