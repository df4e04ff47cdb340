"""What a process of the tests imports before it forks others (see `launch`), which then import and collect nothing."""

import gc

gc.collect()
gc.freeze()  # else each collection copies every page that a fork shares
