"""The commands of ``vera-fx``, a file each."""
