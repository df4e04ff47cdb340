"""Chat templates of public families, rebuilt from their wording: turns, ends, generation prompts, reasoning.

Tool calls, dates and video are left out; what is written around questions and answers is theirs.
"""

from __future__ import annotations

from dataclasses import dataclass

from templates import llava
from transformers import LlavaProcessor

TEXT = """
{%- macro text(content, image='<image>') -%}
{%- if content is string -%}{{ content }}{%- else -%}
{%- for part in content -%}
{%- if part.type == 'image' -%}{{ image }}{%- else -%}{{ part.text }}{%- endif -%}
{%- endfor -%}{%- endif -%}
{%- endmacro -%}
"""

QWEN_25_VL = (
    TEXT
    + """
{%- for message in messages -%}
{%- if loop.first and message.role != 'system' -%}{{ '<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n' }}
{%- endif -%}
{{- '<|im_start|>' + message.role + '\n' -}}
{{- text(message.content, '<|vision_start|><image><|vision_end|>') + '<|im_end|>\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\n' }}{%- endif -%}
"""
)

QWEN_3_VL = (
    TEXT
    + """
{%- for message in messages -%}
{{- '<|im_start|>' + message.role + '\n' -}}
{{- text(message.content, '<|vision_start|><image><|vision_end|>') + '<|im_end|>\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\n' }}{%- endif -%}
"""
)

# Reasoning is written for answers behind the last question only, an empty block where there is none.
QWEN_3_THINKING = (
    TEXT
    + """
{%- set ns = namespace(last=-1) -%}
{%- for message in messages -%}{%- if message.role == 'user' -%}{%- set ns.last = loop.index0 -%}{%- endif -%}
{%- endfor -%}
{%- for message in messages -%}
{%- set content = text(message.content, '<|vision_start|><image><|vision_end|>') -%}
{%- if message.role != 'assistant' -%}{{ '<|im_start|>' + message.role + '\n' + content + '<|im_end|>\n' }}
{%- else -%}
{%- set reasoning = '' -%}
{%- if message.reasoning_content is string -%}{%- set reasoning = message.reasoning_content -%}
{%- elif '</think>' in content -%}
{%- set reasoning = content.split('</think>')[0].rstrip('\n').split('<think>')[-1].lstrip('\n') -%}
{%- set content = content.split('</think>')[-1].lstrip('\n') -%}
{%- endif -%}
{%- if loop.index0 > ns.last -%}
{{- '<|im_start|>assistant\n<think>\n' + reasoning.strip('\n') + '\n</think>\n\n' + content.lstrip('\n') -}}
{%- else -%}{{ '<|im_start|>assistant\n' + content }}
{%- endif -%}{{ '<|im_end|>\n' }}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\nOPEN' }}{%- endif -%}
"""
)

SMOLVLM = (
    TEXT
    + """
{{- '<|im_start|>' -}}
{%- for message in messages -%}
{{- message.role | capitalize -}}{{- ':' if message.content[0].type == 'image' else ': ' -}}
{{- text(message.content) + '<end_of_utterance>\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ 'Assistant:' }}{%- endif -%}
"""
)

LLAVA_15 = """
{%- for message in messages -%}
{%- if message.role != 'system' -%}{{ message.role.upper() + ': ' }}{%- endif -%}
{%- for part in message.content | selectattr('type', 'equalto', 'image') -%}{{ '<image>\n' }}{%- endfor -%}
{%- for part in message.content | selectattr('type', 'equalto', 'text') -%}
{%- generation -%}{{ part.text + ' ' }}{%- endgeneration -%}{%- endfor -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ 'ASSISTANT:' }}{%- endif -%}
"""

# "assistant \n" before answers, "assistant\n" when asked.
LLAVA_ONEVISION = """
{%- for message in messages -%}
{{- '<|im_start|>' + message.role + ' ' -}}
{%- for part in message.content | selectattr('type', 'equalto', 'image') -%}{{ '<image>' }}{%- endfor -%}
{%- for part in message.content | selectattr('type', 'equalto', 'text') -%}{{ '\n' + part.text }}{%- endfor -%}
{{- '<|im_end|>' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\n' }}{%- endif -%}
"""

INTERNVL_3 = QWEN_3_VL.replace("<|vision_start|><image><|vision_end|>", "<image>\\n")

GEMMA_3 = (
    TEXT
    + """
{{- bos_token -}}
{%- set first = '' -%}
{%- if messages[0].role == 'system' -%}
{%- set first = text(messages[0].content) + '\n\n' -%}{%- set messages = messages[1:] -%}
{%- endif -%}
{%- for message in messages -%}
{%- if (message.role == 'user') != (loop.index0 % 2 == 0) -%}{{ raise_exception('Roles must alternate') }}{%- endif -%}
{{- '<start_of_turn>' + ('model' if message.role == 'assistant' else message.role) + '\n' -}}
{{- first if loop.first -}}
{{- text(message.content) | trim + '<end_of_turn>\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<start_of_turn>model\n' }}{%- endif -%}
"""
)

PHI_4 = (
    TEXT
    + """
{%- for message in messages -%}{{ '<|' + message.role + '|>' + text(message.content) + '<|end|>' }}{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<|assistant|>' }}{%- else -%}{{ eos_token }}{%- endif -%}
"""
)

LLAMA_32 = (
    TEXT
    + """
{{- bos_token -}}
{%- for message in messages -%}
{{- '<|start_header_id|>' + message.role + '<|end_header_id|>\n\n' + text(message.content) | trim + '<|eot_id|>' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{%- endif -%}
"""
)

LLAMA_4 = LLAMA_32.replace("_header_id|>", "_header|>").replace("<|eot_id|>", "<|eot|>")

PIXTRAL = (
    TEXT
    + """
{{- bos_token -}}
{%- for message in messages -%}
{%- if message.role == 'user' -%}{{ '[INST]' + text(message.content) + '[/INST]' }}
{%- elif message.role == 'assistant' -%}{{ text(message.content) + eos_token }}
{%- else -%}{{ raise_exception('Only user and assistant roles are supported') }}
{%- endif -%}
{%- endfor -%}
"""
)

# The next turn's mark is the end of the one before; answers are reasoning and answer as the model wrote them.
GLM_41V = (
    TEXT
    + """
{{- '[gMASK]<sop>' -}}
{%- for message in messages -%}
{{- '<|' + message.role + '|>\n' + text(message.content, '<|begin_of_image|><image><|end_of_image|>') -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<|assistant|>\n' }}{%- endif -%}
"""
)

GLM_45V = (
    TEXT
    + """
{{- '[gMASK]<sop>' -}}
{%- for message in messages -%}
{%- if message.role != 'assistant' -%}
{{- '<|' + message.role + '|>\n' + text(message.content, '<|begin_of_image|><image><|end_of_image|>') -}}
{%- else -%}
{{- '<|assistant|>\n<think>' + (message.reasoning_content | trim if message.reasoning_content and loop.last else '') -}}
{{- '</think>\n' + text(message.content) | trim -}}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<|assistant|>' }}{%- endif -%}
"""
)

# Reasoning is cut out of every answer, and opened in the prompt.
DEEPSEEK_R1 = (
    TEXT
    + """
{{- bos_token -}}
{%- for message in messages -%}
{%- if message.role == 'assistant' -%}
{{- '<|Assistant|>' + text(message.content).split('</think>')[-1] + '<|end_of_sentence|>' -}}
{%- else -%}{{ ('<|User|>' if message.role == 'user' else '') + text(message.content) }}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<|Assistant|><think>\n' }}{%- endif -%}
"""
)

GRANITE = (
    TEXT
    + """
{%- for message in messages -%}
{{- '<|' + message.role + '|>\n' + text(message.content, '<image>\n') -}}
{{- '<|end_of_text|>\n' if message.role == 'assistant' else '\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<|assistant|>\n' }}{%- endif -%}
"""
)

KIMI = (
    TEXT
    + """
{%- for message in messages -%}
{{- '<|im_' + message.role + '|>' + message.role + '<|im_middle|>' + text(message.content) + '<|im_end|>' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<|im_assistant|>assistant<|im_middle|>' }}{%- endif -%}
"""
)

AYA = (
    TEXT
    + """
{{- bos_token -}}
{%- for message in messages -%}
{{- '<|START_OF_TURN_TOKEN|><|' + {'user': 'USER', 'assistant': 'CHATBOT', 'system': 'SYSTEM'}[message.role] -}}
{{- '_TOKEN|>' + text(message.content) + '<|END_OF_TURN_TOKEN|>' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>' }}{%- endif -%}
"""
)

MOLMO = (
    TEXT
    + """
{%- for message in messages -%}
{{- (' ' if not loop.first else '') + message.role | capitalize + ': ' + text(message.content) -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ ' Assistant:' }}{%- endif -%}
"""
)

ERNIE = (
    TEXT
    + """
{{- bos_token -}}
{%- for message in messages -%}
{%- if message.role == 'assistant' -%}{{ 'Assistant: ' + text(message.content) + '<|end_of_sentence|>' }}
{%- else -%}{{ message.role | capitalize + ': ' + text(message.content) + '\n' }}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ 'Assistant: ' }}{%- endif -%}
"""
)

EMPTY = "<think>\n\n</think>\n\n"
REASON = "I see"


@dataclass(frozen=True)
class Chat:
    """A template, the token that ends answers, and what the model writes before the last answer.

    `last` is the end of the last answer, where it differs; `middle` is what the model writes before others. `lead` is
    written before an answer without reasoning, `reasoned` before one with it; "": the generation prompt leaves no
    place for it.
    """

    template: str
    end: str = "<|im_end|>"
    last: str = ""
    middle: str = ""
    lead: str = ""
    reasoned: str = f"<think>\n{REASON}\n</think>\n\n"
    system: bool = True


CHATS = {
    "qwen2.5-vl": Chat(QWEN_25_VL),
    "qwen3-vl": Chat(QWEN_3_VL),
    "qwen3-vl-thinking": Chat(
        QWEN_3_THINKING.replace("OPEN", "<think>\\n"),
        lead="\n</think>\n\n", reasoned=f"{REASON}\n</think>\n\n",
    ),
    "minicpm-v-4.5": Chat(QWEN_3_THINKING.replace("OPEN", ""), lead=EMPTY),
    "qwen3, not thinking": Chat(QWEN_3_THINKING.replace("OPEN", EMPTY.replace("\n", "\\n")), reasoned=""),
    "smolvlm": Chat(SMOLVLM, "<end_of_utterance>", middle=" ", lead=" ", reasoned=f" <think>\n{REASON}\n</think>\n\n"),
    "llava-1.5": Chat(LLAVA_15, "", "</s>", middle=" ", lead=" ", reasoned=f" <think>\n{REASON}\n</think>\n\n"),
    "llava-onevision": Chat(LLAVA_ONEVISION),
    "internvl3": Chat(INTERNVL_3),
    "gemma3": Chat(GEMMA_3, "<end_of_turn>"),
    "phi-4": Chat(PHI_4, "<|end|>"),
    "llama-3.2": Chat(LLAMA_32, "<|eot_id|>"),
    "llama-4": Chat(LLAMA_4, "<|eot|>"),
    "pixtral": Chat(PIXTRAL, "</s>", system=False),
    "glm-4.1v": Chat(GLM_41V, "<|user|>", "</s>"),
    "glm-4.5v": Chat(
        GLM_45V, "<|user|>", "</s>", middle="\n<think></think>\n", lead="\n<think></think>\n",
        reasoned=f"\n<think>{REASON}</think>\n"
    ),
    "deepseek-r1": Chat(
        DEEPSEEK_R1, "<|end_of_sentence|>", lead="</think>\n\n", reasoned=f"{REASON}\n</think>\n\n"
    ),
    "granite": Chat(GRANITE, "<|end_of_text|>"),
    "kimi": Chat(KIMI),
    "aya": Chat(AYA, "<|END_OF_TURN_TOKEN|>"),
    "molmo": Chat(MOLMO, "", "</s>", middle=" ", lead=" ", reasoned=f" <think>\n{REASON}\n</think>\n\n"),
    "ernie": Chat(ERNIE, "<|end_of_sentence|>", middle=" "),
}  # fmt: skip

TOKENS = """
<|observation|> [gMASK] <sop> <|begin_of_image|> <|end_of_image|> <|User|> <|Assistant|> <|end_of_sentence|>
<|end_of_text|> <|im_user|> <|im_assistant|> <|im_system|> <|im_middle|> <|START_OF_TURN_TOKEN|>
<|END_OF_TURN_TOKEN|> <|USER_TOKEN|> <|CHATBOT_TOKEN|> <|SYSTEM_TOKEN|> <|start_header|> <|end_header|> <|eot|>
"""


def reader(template: str) -> LlavaProcessor:
    """A processor with the template, whose tokenizer knows the tokens of all, and pairs of line breaks as one."""
    processor = llava(template)
    tokens = processor.tokenizer
    tokens.add_special_tokens({"additional_special_tokens": TOKENS.split()}, replace_extra_special_tokens=False)
    tokens.add_tokens(["<think>", "</think>", "\n\n"])  # as Qwen has them: not special
    return processor
