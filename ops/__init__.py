"""Recurrences as pure functions on arrays: one signature, several implementations each."""

from ops.causal_conv import causal_conv as causal_conv
from ops.causal_conv import causal_conv_step as causal_conv_step
from ops.dispatch import explain as explain
from ops.dispatch import for_platform as for_platform
from ops.linear_scan import linear_scan as linear_scan
from ops.linear_scan import linear_scan_step as linear_scan_step
from ops.normalize import l2_normalize as l2_normalize
from ops.selective_scan import selective_scan as selective_scan
from ops.selective_scan import selective_scan_step as selective_scan_step
