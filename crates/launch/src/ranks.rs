use crate::{Error, Result};

/// Which of a job's workers a process is.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Ranks {
    /// Among all, from 0.
    pub rank: usize,
    /// Workers.
    pub world_size: usize,
    /// Among those of this machine.
    pub local_rank: usize,
    /// `host:port` of rank 0; unused by one worker.
    pub master: String,
    /// What tells this job from others.
    pub job: String,
}

/// Names under which a launcher tells rank, world size and local rank, the first of which decides that it is
/// this launcher.
const LAUNCHERS: [[&str; 3]; 4] = [
    // torchrun, and our own.
    ["RANK", "WORLD_SIZE", "LOCAL_RANK"],
    ["OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK"],
    ["PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID"],
    // A pod of a Kubernetes job; the template sets the others.
    ["JOB_COMPLETION_INDEX", "WORLD_SIZE", "LOCAL_RANK"],
];

/// Of a step that srun started: in a batch script itself, SLURM_PROCID is set too.
const SLURM: [&str; 3] = ["SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID"];

/// The port of torchrun, unless told.
const MASTER_PORT: &str = "29500";

impl Ranks {
    /// A job of one process.
    pub fn alone() -> Self {
        Self { rank: 0, world_size: 1, local_rank: 0, master: String::new(), job: "anchorage".into() }
    }

    /// As the variables of torchrun, Open MPI, other MPIs, Slurm or Kubernetes say; one worker without any.
    ///
    /// # Errors
    /// When a variable is missing beside others or is no number, and when several workers have no address
    /// of the first.
    pub fn of(variable: impl Fn(&str) -> Option<String>) -> Result<Self> {
        let by_slurm = variable("SLURM_STEP_ID").is_some().then_some(&SLURM);
        let launchers = LAUNCHERS.iter().chain(by_slurm);
        let Some([rank_name, size_name, local_name]) =
            launchers.into_iter().find(|names| variable(names[0]).is_some())
        else {
            return Ok(Self::alone());
        };
        let number = |name: &'static str, missing: Option<usize>| match (variable(name), missing) {
            (Some(text), _) => text.parse().map_err(|_| Error::Variable {
                name,
                expected: "a whole number".into(),
                found: text,
            }),
            (None, Some(value)) => Ok(value),
            (None, None) => Err(Error::Variable {
                name,
                expected: format!("one beside {rank_name}"),
                found: "none".into(),
            }),
        };
        let (rank, world_size) = (number(rank_name, None)?, number(size_name, None)?);
        let local_rank = number(local_name, Some(0))?;
        if rank >= world_size {
            let expected = format!("below {size_name} ({world_size})");
            return Err(Error::Variable { name: rank_name, expected, found: rank.to_string() });
        }
        let job = ["ANCHORAGE_JOB", "TORCHELASTIC_RUN_ID", "SLURM_JOB_ID"].into_iter().find_map(&variable);
        let host =
            variable("MASTER_ADDR").or_else(|| variable("SLURM_STEP_NODELIST").map(|list| first_host(&list)));
        let master = match host {
            Some(host) => format!("{host}:{}", variable("MASTER_PORT").unwrap_or(MASTER_PORT.into())),
            None if world_size == 1 => String::new(),
            None => {
                let expected = format!("the host of rank 0, for {world_size} workers");
                return Err(Error::Variable { name: "MASTER_ADDR", expected, found: "none".into() });
            }
        };
        Ok(Self { rank, world_size, local_rank, master, job: job.unwrap_or("anchorage".into()) })
    }
}

/// The first host of a list as Slurm writes it: `node[03-07,9],other` begins with `node03`.
fn first_host(list: &str) -> String {
    match list.split_once('[') {
        Some((prefix, rest)) if !prefix.contains(',') => {
            let (inside, after) = rest.split_once(']').unwrap_or((rest, ""));
            let number = inside.split([',', '-']).next().unwrap_or(inside);
            let suffix = after.split(',').next().unwrap_or("");
            format!("{prefix}{number}{suffix}")
        }
        _ => list.split(',').next().unwrap_or(list).to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(variables: &[(&str, &str)]) -> Result<Ranks> {
        Ranks::of(|name| {
            variables.iter().find(|(found, _)| *found == name).map(|(_, value)| (*value).to_owned())
        })
    }

    fn ranks(rank: usize, world_size: usize, local_rank: usize, master: &str, job: &str) -> Ranks {
        Ranks { rank, world_size, local_rank, master: master.into(), job: job.into() }
    }

    #[test]
    fn the_launchers_variables_are_understood() {
        assert_eq!(of(&[]).unwrap(), Ranks::alone());
        let torchrun = [
            ("RANK", "3"),
            ("WORLD_SIZE", "8"),
            ("LOCAL_RANK", "1"),
            ("MASTER_ADDR", "a.example"),
            ("MASTER_PORT", "1234"),
            ("TORCHELASTIC_RUN_ID", "run7"),
        ];
        assert_eq!(of(&torchrun).unwrap(), ranks(3, 8, 1, "a.example:1234", "run7"));
        let mpi = [
            ("OMPI_COMM_WORLD_RANK", "1"),
            ("OMPI_COMM_WORLD_SIZE", "2"),
            ("OMPI_COMM_WORLD_LOCAL_RANK", "1"),
            ("MASTER_ADDR", "a"),
        ];
        assert_eq!(of(&mpi).unwrap(), ranks(1, 2, 1, "a:29500", "anchorage"));
        let mpich = [("PMI_RANK", "1"), ("PMI_SIZE", "2"), ("MPI_LOCALRANKID", "0"), ("MASTER_ADDR", "a")];
        assert_eq!(of(&mpich).unwrap(), ranks(1, 2, 0, "a:29500", "anchorage"));
        let pod = [("JOB_COMPLETION_INDEX", "1"), ("WORLD_SIZE", "4"), ("MASTER_ADDR", "run-0.run")];
        assert_eq!(of(&pod).unwrap(), ranks(1, 4, 0, "run-0.run:29500", "anchorage"));
        let slurm = [
            ("SLURM_STEP_ID", "0"),
            ("SLURM_PROCID", "5"),
            ("SLURM_STEP_NUM_TASKS", "6"),
            ("SLURM_LOCALID", "1"),
            ("SLURM_JOB_ID", "77"),
            ("SLURM_STEP_NODELIST", "gpu[03-05],big1"),
        ];
        assert_eq!(of(&slurm).unwrap(), ranks(5, 6, 1, "gpu03:29500", "77"));
        // The batch script itself is no worker.
        assert_eq!(of(&slurm[1..]).unwrap(), Ranks::alone());
    }

    #[test]
    fn lists_of_hosts_begin_with_the_first() {
        for (list, first) in [
            ("n1", "n1"),
            ("n1,n2", "n1"),
            ("n[1-3]", "n1"),
            ("n[007,009-11]", "n007"),
            ("rack[1-2]-n,other", "rack1-n"),
            ("login,n[1-3]", "login"),
        ] {
            assert_eq!(first_host(list), first);
        }
    }

    #[test]
    fn variables_that_say_nothing_sensible_are_refused() {
        let refused = |variables: &[(&str, &str)]| of(variables).unwrap_err().to_string();
        assert_eq!(refused(&[("RANK", "1")]), "WORLD_SIZE: expected one beside RANK, found none");
        assert_eq!(refused(&[("RANK", "x"), ("WORLD_SIZE", "2")]), "RANK: expected a whole number, found x");
        assert_eq!(
            refused(&[("RANK", "2"), ("WORLD_SIZE", "2")]),
            "RANK: expected below WORLD_SIZE (2), found 2"
        );
        assert_eq!(
            refused(&[("RANK", "0"), ("WORLD_SIZE", "2")]),
            "MASTER_ADDR: expected the host of rank 0, for 2 workers, found none"
        );
    }
}
