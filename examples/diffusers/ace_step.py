"""Music by ACE-Step 1.5 without its text encoder. The prompt is the caption."""

import wave
from collections.abc import Sequence

import torch
from common import DTYPES, arguments, client, sampling
from diffusers import AceStepPipeline

LYRICS = "[Instrumental]"
SECONDS = 60.0


def main(argv: Sequence[str] | None = None, seconds: float = SECONDS) -> None:
    options = arguments(__doc__, "ACE-Step/acestep-v15-xl-turbo-diffusers", "music.wav", argv)
    pipe = AceStepPipeline.from_pretrained(
        options.model, text_encoder=None, tokenizer=None, dtype=DTYPES[options.dtype]
    )
    pipe.to(options.device)
    with client(options) as service:
        service.patch(pipe)
        [sound] = pipe(prompt=options.prompt, lyrics=LYRICS, audio_duration=seconds, **sampling(options)).audios
    write_wave(options.output, sound, pipe.vae.config.sampling_rate)


def write_wave(path: str, sound: torch.Tensor, rate: int) -> None:
    """Write (channels, samples) between -1 and 1 as 16-bit PCM."""
    samples = (sound.float().cpu().clamp(-1, 1) * 32767).to(torch.int16)
    with wave.open(path, "wb") as file:
        file.setnchannels(samples.shape[0])
        file.setsampwidth(2)
        file.setframerate(rate)
        file.writeframes(samples.T.contiguous().numpy().tobytes())


if __name__ == "__main__":
    main()
