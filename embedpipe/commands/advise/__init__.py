"""advise: measure which mode of transfer learning suits a data set, and recommend one action.

>>> advice = advise("pets", verify=True)
>>> advice.action, advice.reason, advice.commands
"""

from embedpipe.commands.advise._advise import Advice, advise
