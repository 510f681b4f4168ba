"""scripts/centering.py: which convolutions each variant normalizes how."""
from collections import Counter

import centering
import pytest
import timm

import timm_aws


@pytest.mark.parametrize(('variant', 'expected'), [
    ('plain, SGD with decay', {}), ('wn', {'wn': 34}), ('ws', {'ws': 34}),
    ('ws, small wn', {'ws': 5, 'wn': 29}),
    ('ws, grouped wn', {'ws': 23, 'wn': 11}), ('wn, grouped ws', {'wn': 23, 'ws': 11}),  # eleven are depthwise
])
def test_variant_normalizes_what_it_names(variant, expected):
    model = centering.normalize_as(timm.create_model('mobilenetv3_small_050'), centering.VARIANTS[variant])
    assert Counter(timm_aws.normalized_weights(model).values()) == expected


def test_every_variant_is_tested_and_has_a_name_in_the_findings():
    import findings

    assert {name.partition('_')[2] for name in findings.of_small_filters() if name.startswith('mobilenetv3')} == {
        'plain', 'wn', 'ws', 'ws_but_small', 'ws_but_grouped', 'wn_but_grouped'}
    assert len(centering.VARIANTS) == 6
