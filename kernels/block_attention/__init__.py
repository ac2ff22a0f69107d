"""Causal attention over chosen blocks of keys: the blocks, the choice and the attention."""

from bestiary.kernels.block_attention.api import attended_keys as attended_keys
from bestiary.kernels.block_attention.api import block_attention as block_attention
from bestiary.kernels.block_attention.api import multiplied_keys as multiplied_keys
from bestiary.kernels.block_attention.blocks import Blocks as Blocks
from bestiary.kernels.block_attention.blocks import Places as Places
from bestiary.kernels.block_attention.blocks import block_keys as block_keys
from bestiary.kernels.block_attention.blocks import block_of_keys as block_of_keys
from bestiary.kernels.block_attention.blocks import by_queries as by_queries
from bestiary.kernels.block_attention.blocks import choosable_blocks as choosable_blocks
from bestiary.kernels.block_attention.blocks import choose as choose
from bestiary.kernels.block_attention.blocks import complete_blocks as complete_blocks
from bestiary.kernels.block_attention.blocks import earlier as earlier
from bestiary.kernels.block_attention.blocks import find_places as find_places
from bestiary.kernels.block_attention.blocks import take_by_row as take_by_row
from bestiary.kernels.block_attention.gathered import gathered_attention as gathered_attention
