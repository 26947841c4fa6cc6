"""Making text: choice of tokens, beams, constraints, chat templates."""

from flaxcompress.decoding.constraints import Constraint
from flaxcompress.decoding.conversation import Conversation
from flaxcompress.decoding.generate import Generated, OnToken, Prompt, generate
from flaxcompress.decoding.sampling import Sampling

__all__ = ["Constraint", "Conversation", "Generated", "OnToken", "Prompt", "Sampling", "generate"]
