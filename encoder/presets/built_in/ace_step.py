"""ACE-Step 1.5 and DiffSynth-Music, text to music.

How to read the numbers beside the fields: see the package's docstring.
"""

from dataclasses import replace

from encoder.presets.preset import Preset

ACE_STEP = Preset(
    name="ace-step",
    description="ACE-Step 1.5, text to music (Qwen3-Embedding-0.6B), 60 seconds and no other metas.",
    source="diffusers: pipelines/ace_step/pipeline_ace_step.py, encode_prompt",
    prefix="# Instruction\nFill the audio semantic mask based on the given conditions:\n\n# Caption\n",  # 38, 40
    suffix="\n\n# Metas\n"  # 38
    "- bpm: N/A\n- timesignature: N/A\n- keyscale: N/A\n- duration: 60 seconds\n"  # 336-345, 407
    "<|endoftext|>\n",  # 38. For other metas a request gives its own prefix and suffix.
    closing_token="<|endoftext|>",  # Qwen3-Embedding's tokenizer adds it; ComfyUI writes it: text_encoders/ace15.py,
    # ACE15Tokenizer.tokenize_with_weights
    max_sequence_length=256,  # 412, 479
    overlong="cut",  # 478
    padding="longest",  # 477
    padding_rows="cut",  # 483: the mask is returned beside the rows
    hidden_states=(-1,),  # 497: last_hidden_state
    negative_prompt=None,  # the pipeline has a learned embedding for it
)

ACE_STEP_LYRICS = Preset(
    name="ace-step-lyrics",
    description="The lyrics of ACE-Step 1.5, English: rows of the embedding table.",
    source="diffusers: pipelines/ace_step/pipeline_ace_step.py, encode_prompt",
    prefix="# Languages\nen\n\n# Lyric\n",  # 397, 406
    suffix="<|endoftext|>",  # 397
    closing_token="<|endoftext|>",  # as above
    max_sequence_length=2048,  # 413, 490
    overlong="cut",  # 489
    padding="longest",  # 488
    padding_rows="cut",  # 494
    hidden_states=(0,),  # 501-502: the embedding layer alone
    negative_prompt=None,
)

DIFFSYNTH_MUSIC = replace(
    ACE_STEP,
    name="diffsynth-music",
    description="DiffSynth-Music (Qwen3-Embedding-0.6B), 160 seconds and the metas that its pipeline assumes.",
    source="DiffSynth-Studio: diffsynth/pipelines/diffsynth_music.py, process",
    suffix="\n\n# Metas\n"  # 239; the prefix is 233-236
    "- bpm: 100\n- timesignature: 4\n- keyscale: B minor\n- duration: 160 seconds\n"  # 228-230, 124
    "<|endoftext|>",  # 244-245: stripped, so no newline follows. For other metas a request gives its own suffix.
)  # 202-212, 246: the rest is as in ACE-Step

DIFFSYNTH_MUSIC_LYRICS = replace(  # 214-224, 249: the rest is as in ACE-Step
    ACE_STEP_LYRICS,
    name="diffsynth-music-lyrics",
    description="The lyrics of DiffSynth-Music, no language given: rows of the embedding table.",
    source="DiffSynth-Studio: diffsynth/pipelines/diffsynth_music.py, process",
    prefix="# Languages\nN/A\n\n# Lyric\n",  # 190, 247-248
)
