use std::ffi::OsStr;
use std::fmt;
use std::path::Path;
use std::process::{Command, Stdio};

use serde::{Deserialize, Serialize};

use crate::{Error, Result};

/// A job that Slurm knows.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct JobId(pub u64);

impl fmt::Display for JobId {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        write!(f, "{}", self.0)
    }
}

/// How a job is, in Slurm's words.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct JobState {
    /// Such as `PENDING`.
    pub state: String,
    /// Why it waits or has ended; `None` in Slurm's words is no reason.
    pub reason: String,
    /// Its nodes, as a list of Slurm's; empty while it has none.
    pub nodes: String,
    /// For how long it has run.
    pub run_time: String,
    /// For how long it may.
    pub time_limit: String,
    /// How often it has been queued again.
    pub restarts: u64,
}

impl JobState {
    /// Whether nothing of it runs or will.
    pub fn is_over(&self) -> bool {
        const OVER: [&str; 9] = [
            "BOOT_FAIL",
            "CANCELLED",
            "COMPLETED",
            "DEADLINE",
            "FAILED",
            "NODE_FAIL",
            "OUT_OF_MEMORY",
            "PREEMPTED",
            "TIMEOUT",
        ];
        OVER.contains(&self.state.as_str())
    }
}

/// Gives a script to sbatch in a folder.
///
/// # Errors
/// When there is no sbatch, and when it refuses.
pub fn submit(script: &Path, folder: &Path) -> Result<JobId> {
    let out = run("sbatch", &["--parsable".as_ref(), script.as_os_str()], Some(folder))?;
    id_of(&out)
}

/// The number of a job, which the cluster's name may follow.
fn id_of(out: &str) -> Result<JobId> {
    let number = out.trim().split(';').next().and_then(|id| id.parse().ok());
    number.map(JobId).ok_or_else(|| Error::Answer {
        program: "sbatch",
        expected: "the number of a job",
        found: out.trim().replace('\n', " "),
    })
}

/// How a job is; `None` of one that Slurm has forgotten.
///
/// # Errors
/// When there is no scontrol, and when it does not answer.
pub fn find(job: JobId) -> Result<Option<JobState>> {
    let id = job.to_string();
    match run("scontrol", &["show", "job", "--oneliner", &id].map(OsStr::new), None) {
        Ok(out) => state_of(&out).map(Some),
        Err(Error::Refused { said, .. }) if said.contains("Invalid job id") => Ok(None),
        Err(error) => Err(error),
    }
}

/// The first job of what scontrol shows: of a heterogeneous one the part that runs the script.
fn state_of(shown: &str) -> Result<JobState> {
    let line = shown.lines().next().unwrap_or_default();
    let value = |key: &str| {
        let found = line.split_whitespace().find_map(|word| word.strip_prefix(key)?.strip_prefix('='));
        found.filter(|value| *value != "(null)").unwrap_or_default().to_owned()
    };
    let state = JobState {
        state: value("JobState"),
        reason: value("Reason"),
        nodes: value("NodeList"),
        run_time: value("RunTime"),
        time_limit: value("TimeLimit"),
        restarts: value("Restarts").parse().unwrap_or(0),
    };
    match state.state.is_empty() {
        false => Ok(state),
        true => Err(Error::Answer {
            program: "scontrol",
            expected: "JobState=…",
            found: line.chars().take(200).collect(),
        }),
    }
}

/// Has Slurm end a job, running or not.
///
/// # Errors
/// When there is no scancel, and when it refuses.
pub fn cancel(job: JobId) -> Result<()> {
    run("scancel", &[job.to_string().as_ref()], None).map(drop)
}

/// Tells the script of a running job to have the workers save, and to queue the job again.
///
/// # Errors
/// When there is no scancel, and when it refuses.
pub fn stop(job: JobId) -> Result<()> {
    run("scancel", &["--batch", "--signal=USR1", &job.to_string()].map(OsStr::new), None).map(drop)
}

/// Has Slurm queue a job again as it is.
///
/// # Errors
/// When there is no scontrol, and when it refuses.
pub fn requeue(job: JobId) -> Result<()> {
    run("scontrol", &["requeue", &job.to_string()].map(OsStr::new), None).map(drop)
}

/// Runs one of Slurm's programs; what it printed.
fn run(program: &'static str, args: &[&OsStr], folder: Option<&Path>) -> Result<String> {
    let mut command = Command::new(program);
    command.args(args).stdin(Stdio::null()).current_dir(folder.unwrap_or(Path::new(".")));
    let output = command.output().map_err(|source| match source.kind() {
        std::io::ErrorKind::NotFound => Error::Missing { program },
        _ => Error::Io { path: program.into(), source },
    })?;
    match output.status.success() {
        true => Ok(String::from_utf8_lossy(&output.stdout).into_owned()),
        false => Err(Error::Refused { program, said: said(program, &output.stderr) }),
    }
}

/// What a program said, in one line without its name before each.
fn said(program: &str, stderr: &[u8]) -> String {
    let text = String::from_utf8_lossy(stderr);
    let strip = |line: &str| {
        let line = line.trim();
        let line = line.strip_prefix(&format!("{program}: ")).unwrap_or(line);
        line.strip_prefix("error: ").unwrap_or(line).to_owned()
    };
    let lines: Vec<String> = text.lines().map(strip).filter(|line| !line.is_empty()).collect();
    match lines.is_empty() {
        true => "it failed and said nothing".to_owned(),
        false => lines.join("; "),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_slurm_prints_is_understood() {
        assert_eq!(id_of("12\n").unwrap(), JobId(12));
        assert_eq!(id_of("12;main\n").unwrap(), JobId(12));
        assert_eq!(
            id_of("Submitted batch job 12\n").unwrap_err().to_string(),
            "sbatch: expected the number of a job, found Submitted batch job 12"
        );
        let line = |state: &str, nodes: &str| {
            format!(
                "JobId=1 HetJobId=1 JobName=t UserId=a(1) JobState={state} Reason=None Requeue=1 Restarts=2 \
                 RunTime=00:00:03 TimeLimit=00:02:00 ReqNodeList=(null) NodeList={nodes} BatchHost=n0 \
                 WorkDir=/a JobState=b \n"
            )
        };
        let expected = JobState {
            state: "RUNNING".into(),
            reason: "None".into(),
            nodes: "n[0-1]".into(),
            run_time: "00:00:03".into(),
            time_limit: "00:02:00".into(),
            restarts: 2,
        };
        let both = line("RUNNING", "n[0-1]") + &line("PENDING", "n2");
        assert_eq!(state_of(&both).unwrap(), expected);
        assert!(!expected.is_over());
        let waits = state_of(&line("PENDING", "(null)")).unwrap();
        assert_eq!((waits.nodes.as_str(), waits.is_over()), ("", false));
        assert!(state_of(&line("TIMEOUT", "n2")).unwrap().is_over());
        assert_eq!(
            state_of("nothing\n").unwrap_err().to_string(),
            "scontrol: expected JobState=…, found nothing"
        );
    }

    #[test]
    fn refusals_are_one_line() {
        let text =
            b"sbatch: error: invalid partition specified: x\nsbatch: error: Batch job submission failed: y\n";
        assert_eq!(said("sbatch", text), "invalid partition specified: x; Batch job submission failed: y");
        assert_eq!(said("sbatch", b"\n"), "it failed and said nothing");
        let missing = run("no-such-program-of-slurm", &[], None).unwrap_err().to_string();
        assert_eq!(missing, "no-such-program-of-slurm: not found; is this a machine of a site with Slurm?");
        let refused = run("ls", &["/no such file".as_ref()], None).unwrap_err().to_string();
        assert!(refused.starts_with("ls: ") && refused.contains("/no such file"), "{refused}");
    }
}
