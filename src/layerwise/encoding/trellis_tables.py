"""The values of the 256 states of a trellis, a table for every width of codes. Version 1.

Made once, and part of the stored form since: from normal quantiles in sixteen random orders, rings of 32 normally
distributed numbers were cut to their best paths, and every state took the mean of what had been cut to it, until that
settled (generalised Lloyd); the best table was rounded to whole numbers, the largest at 127. On other numbers, the
error in decibels below a variance of one, beside the best even steps of as many codes and what no code can pass:

    bits    trellis   even steps   bound        worth, bits a weight
    1         5.04        4.40       6.02         0.11
    2        10.82        9.25      12.04         0.26
    3        16.60       14.27      18.06         0.39
    4        22.12       19.38      24.08         0.46
    5        27.34       24.57      30.10         0.46
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

TABLE_VERSION = 1
STATES = 256
MOST_BITS = 5
UNIT = {1: 0.01685, 2: 0.02320, 3: 0.02578, 4: 0.02637, 5: 0.02712}  # of a table whose values have a deviation of one
OFFSET = 128  # of the bytes below

_TABLES = {
    1: (
        "987a5c655f44bae119bc9c8299c18b2a8462f05a71af746973739dafd20a728c48728a83497c6c5942f1768a9389c745f788799e72a7"
        "7c3ac174889c90a244ca56a35987b2a49e968099379260c9576632b077b38453c66e328555a6485e62a5937ca342857bc5975b204fa7"
        "547cdf8c5f9289d0966a577786b2516f2f8db148b34b929e9a5e5c13755101e9c8908b816385bd7ebed24e7dae0f7239539ebf1c8c90"
        "5052955830c3786e4ebb3c52987eb37db62ea609397577a59b3c7b9d9afa50a987ac4331ee6bbe57ad7e931b4bb00d5f4864558e69c6"
        "4ab4c3a469bb9367433e7ead888d4c978477355de3c28163a54faa89e0679ea6aa5e85c8a37175ca"
    ),
    2: (
        "86ad82a9b83f51847d63c486c6718d5faf8e524ca3c66892395891826e6c8faf956f71535b6acb886a7d9a176d3d82a5a27ebd449ae4"
        "b66267434b8354257098448762238fbc606d523493c08b9ddc6f97dd7e71759ec95363d777a0257aad84fe2e5c898f4cb7a98f4d6bb1"
        "7a96a07a93477cb17859729e388fb58b87625ebd7a96be51a6703a7d6786a14e917d7452d9588693c2459e7b9aa05b79da014e2fca6a"
        "8fa9b47c8e5ca168815646a3c2899449906a4394804969b277576aaf9c0f8b5fa06da98470ad298969a1755543938a8bb6c28571a0ce"
        "6b77ae51aa4d6a76aed1a67c848d6f293b9ef0675072385b6eb12496739e3e8c796280b8a884c964"
    ),
    3: (
        "b293a4c449718c816780962f8acea34a2993655ab9a97578fc7dac9e57506d8f12826c38997cb9a59fadde5d1f633a893f01b3d85388"
        "98a98d6a97b98244cb759e5d51907aae6874769a5b49d682a869987ca6698eb6c3d8816fc67961a3e9568ca698e484694775ac6a4686"
        "358f705baacdbb906578a7196ab47660967b873f869b3a51619478b08e55b56a76a89281638a65827a6f519d404a592e6d9f7fbe9aba"
        "7b6a7257885d904086755dbc509d76667a4d3e9b858fbb92645131769daa7b4560a3ca8a7099846f2da0bd977eaf57b99637d149677f"
        "c98b23857595586ac26f877ead485b904c8d7a8a6da35e7184ad4f79a05e8e679a5a7e6ea8889482"
    ),
    4: (
        "83875c9bc36f8e74527d657f78a7bb4e498bcb788fa17f996a955760b886ab72cdb2a06267a8997b90be6e4c75818a5953389893864b"
        "8f80616e69768ea05cac5894124f387242687c9d5f2888b1db499e4896715e67287f89b5d0857a94a58e9873a957a160848b7be392b4"
        "6dc152457e546c359ab7a346838e2d745d42ae8865a58c776eb09e889151fd84c8994a808ec6746beb94ab85d559ba3b627bb39c5b79"
        "9943766b346fbbae81664f8a92a41b8d7c84dcbf7551325971aa68609e9576829f8b57679760b1a7c36e7d91853b616883af4e577a01"
        "c2768a9320a39a6fa7b885567f406ca0ad62768b7195677b897d655ccf77b8929ba3a97b83704069"
    ),
    5: (
        "b48a99cb48818785629290358cc196562d9d666bbaab7377fd7ea39c59515e941c7c7246a17aa9a796a4ed5a29653f883801b1d14f8e"
        "92ad8a699db58455c57f9d6161876ca66a7d73a1565dc88c99679082ac6e93b0bcdb7970ce776597d6508da993e37a6f4f82a572417d"
        "3185765ba1c1b89167749c126caf7963977e8a4887994c53628a819f8c5ea871769b9386668f6b837d6d5a9645575e4068a37ab28eb3"
        "75726f5b8463994a88685fb9479b80757c4e43917f83ad956d563b78a0a47d53718cb5816f90836c36a6c8a07dab5db9983cbe49687a"
        "c387247873946275bc788e85b14c6d8b528d82806c9d567086ac5a7ba6608a699365777499889080"
    ),
}


@cache
def table(bits: int) -> Tensor:
    """The value of every state: int8 [256]. Shared: not to be written to."""
    return (torch.tensor(list(bytes.fromhex(_TABLES[bits])), dtype=torch.int16) - OFFSET).to(torch.int8)
