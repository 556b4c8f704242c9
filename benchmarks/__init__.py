"""Speed claims held against named peers, in the same run. Nothing in the product imports this."""

import quantlab as quantlab  # says how torch's threads wait, before torch is loaded
