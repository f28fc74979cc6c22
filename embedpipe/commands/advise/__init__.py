"""advise: which mode of transfer learning a data set wants, measured; the one deed that runs other deeds.

The doors enter here.

>>> advice = advise("pets", verify=True)
>>> advice.action, advice.reason, advice.commands
"""

from embedpipe.commands.advise._advise import Advice, advise

__all__ = ["Advice", "advise"]
