import pytest

from taid_jax.distributed import several_expected
from taid_jax.settings import (
    DistributedSettings,
    SettingsError,
    contradictions,
    from_dict,
)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"coordinator": "host:1"}, "all three, or none"),
        ({"num_processes": 2, "process_id": 0}, "all three, or none"),
        ({"coordinator": "host", "num_processes": 2, "process_id": 0}, "HOST:PORT"),
        ({"coordinator": ":80", "num_processes": 2, "process_id": 0}, "HOST:PORT"),
        ({"coordinator": "h:70000", "num_processes": 2, "process_id": 0}, "HOST:PORT"),
        ({"coordinator": "h:1", "num_processes": 2, "process_id": 2}, "process_id"),
        ({"coordinator": "h:1", "num_processes": 0, "process_id": 0}, "num_processes"),
        ({"join_timeout": 0}, "join_timeout"),
    ],
)
def test_host_settings_that_cannot_be_are_refused(values, message):
    with pytest.raises(SettingsError, match=message):
        DistributedSettings(**values)


def test_host_settings_may_change_when_a_run_goes_on():
    by_hand = {"coordinator": "host:1234", "num_processes": 4, "process_id": 3}
    assert not contradictions(from_dict({}), from_dict(by_hand))


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, False),
        # A shell of an allocation, outside of any step.
        ({"SLURM_JOB_ID": "7", "SLURM_NTASKS": "4"}, False),
        (
            {
                "SLURM_NTASKS": "4",
                "SLURM_PROCID": "0",
                "SLURM_STEP_NODELIST": "node[1-2]",
            },
            True,
        ),
        (
            {"SLURM_NTASKS": "1", "SLURM_PROCID": "0", "SLURM_STEP_NODELIST": "node1"},
            False,
        ),
        ({"OMPI_COMM_WORLD_SIZE": "2"}, True),
        ({"OMPI_COMM_WORLD_SIZE": "1"}, False),
        ({"KUBERNETES_SERVICE_HOST": "10.0.0.1"}, False),
        ({"KUBERNETES_SERVICE_HOST": "10.0.0.1", "JOB_COMPLETION_INDEX": "0"}, True),
        # On a CPU that was asked for, whatever the machine has.
        ({"TPU_WORKER_HOSTNAMES": "a,b"}, False),
    ],
)
def test_several_expected_reads_the_environment(environment, expected):
    assert several_expected(environment, "cpu") is expected


@pytest.mark.parametrize("platforms", [None, "tpu,cpu"])
def test_several_expected_knows_a_tpu_slice(platforms):
    assert several_expected({"TPU_WORKER_HOSTNAMES": "a,b"}, platforms)
    assert several_expected({"MEGASCALE_NUM_SLICES": "2"}, platforms)
    assert not several_expected({"TPU_SKIP_MDS_QUERY": "1"}, platforms)
