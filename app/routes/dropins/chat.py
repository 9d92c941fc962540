"""A chat in Qwen3's template, and the tokens at which its sections begin and end. Handles strings only.

Source: tokenizer_config.json of Qwen3, chat_template; heylookitsanllm, hidden_states.py, ChatTemplateTokenizer.
"""

from dataclasses import dataclass

THINK_END = "</think>"


@dataclass(frozen=True, slots=True)
class Chat:
    """One turn of a user, with optional text before and after it. An empty string means that the part is absent.

    Attributes:
        thinking, assistant: an answer already given; the template opens another turn after it.
        enable_thinking: False closes the thinking of that last turn.
    """

    user: str
    system: str = ""
    thinking: str = ""
    assistant: str = ""
    enable_thinking: bool = True

    @property
    def system_turn(self) -> str:
        """The turn of the system prompt; empty without one."""
        return _turn("system", self.system) if self.system else ""

    @property
    def user_turn(self) -> str:
        """The turn of the user; never empty."""
        return _turn("user", self.user)

    @property
    def text(self) -> str:
        """The whole chat, as `apply_chat_template(..., add_generation_prompt=True)` writes it."""
        last = "<|im_start|>assistant\n" + ("" if self.enable_thinking else "<think>\n\n</think>\n\n")
        return self.system_turn + self.user_turn + self._answer() + last

    def _answer(self) -> str:
        """The answer's turn. The template splits an answer at </think> and joins it again, with or without thinking."""
        content = (f"<think>\n{self.thinking}\n{THINK_END}\n" if self.thinking else "") + self.assistant
        if not content:
            return ""
        thinking = ""
        if THINK_END in content:
            before, *_, after = content.split(THINK_END)
            thinking = before.rstrip("\n").split("<think>")[-1].strip("\n")
            content = after
        return _turn("assistant", f"<think>\n{thinking}\n{THINK_END}\n\n" + content.lstrip("\n"))


def _turn(role: str, content: str) -> str:
    return f"<|im_start|>{role}\n{content}<|im_end|>\n"


def sections(chat: Chat, system_end: int, user_end: int, tokens: list[str]) -> dict[str, tuple[int, int]]:
    """For each section that the chat has: its first token, and the token after its last.

    Args:
        system_end: number of tokens in the system turn.
        user_end: number of tokens in the system and the user turn together.
        tokens: those of the whole chat.
    """
    found = {"system": (0, system_end)} if chat.system else {}
    found["user"] = (system_end, user_end)
    answer = user_end
    if chat.thinking:
        answer = tokens.index(THINK_END, user_end) + 1 if THINK_END in tokens[user_end:] else len(tokens)
        found["think"] = (user_end, answer)
    if chat.assistant:
        found["assistant"] = (answer, len(tokens))
    return found
