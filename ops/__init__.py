"""Recurrences as pure functions on arrays: one signature, several implementations each."""

from ops.causal_conv import causal_conv as causal_conv
from ops.causal_conv import causal_conv_step as causal_conv_step
from ops.dispatch import explain as explain
from ops.dispatch import for_platform as for_platform
from ops.fronts import delta_rule as delta_rule
from ops.fronts import delta_rule_step as delta_rule_step
from ops.fronts import gated_delta_rule as gated_delta_rule
from ops.fronts import gated_delta_rule_step as gated_delta_rule_step
from ops.fronts import gla as gla
from ops.fronts import gla_step as gla_step
from ops.fronts import kda as kda
from ops.fronts import kda_step as kda_step
from ops.fronts import retention as retention
from ops.fronts import retention_step as retention_step
from ops.fronts import ssd as ssd
from ops.fronts import ssd_step as ssd_step
from ops.linear_attention import linear_attention as linear_attention
from ops.linear_attention import linear_attention_step as linear_attention_step
from ops.linear_scan import linear_scan as linear_scan
from ops.linear_scan import linear_scan_step as linear_scan_step
from ops.normalize import l2_normalize as l2_normalize
from ops.plstm_2d import largest_column_sum as largest_column_sum
from ops.plstm_2d import plstm_2d as plstm_2d
from ops.selective_scan import selective_scan as selective_scan
from ops.selective_scan import selective_scan_step as selective_scan_step
