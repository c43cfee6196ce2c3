"""How each library quantises a changed weight again, a file each: what merges write with."""
