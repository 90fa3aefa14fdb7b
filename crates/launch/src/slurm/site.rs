use serde::Deserialize;

use crate::{Error, Result};

/// The section `[slurm]` of a site's file.
#[derive(Clone, Debug, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Site {
    /// Partition of the workers; the site's default without it.
    #[serde(default)]
    pub partition: Option<String>,
    /// Account that is charged; the site's default without it.
    #[serde(default)]
    pub account: Option<String>,
    /// Time limit of the job each time it runs, as Slurm writes it: `[days-]hours:minutes:seconds`.
    pub time: String,
    /// Seconds before the time limit at which the job is told to save and be queued again.
    pub lead_s: u32,
    /// First and last of the ports that jobs use, on all nodes.
    pub ports: (u16, u16),
    /// Lines of the script before anything is started.
    #[serde(default)]
    pub setup: Vec<String>,
    /// More options of sbatch.
    #[serde(default)]
    pub options: Vec<String>,
    /// What workers need.
    pub worker: WorkerSite,
    /// What shards need.
    pub shard: ShardSite,
}

/// What workers need of a site.
#[derive(Clone, Debug, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct WorkerSite {
    /// Most workers on a node.
    pub per_node: usize,
    /// Processors of each.
    pub cpus: usize,
    /// GPUs of each.
    pub gpus: usize,
    /// Memory of each, GiB; without it as much as the site gives.
    #[serde(default)]
    pub memory_gib: Option<f64>,
}

/// What shards need of a site.
#[derive(Clone, Debug, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ShardSite {
    /// Most shards on a node.
    pub per_node: usize,
    /// Processors of each.
    pub cpus: usize,
    /// Memory of each, GiB; without it as much as the site gives.
    #[serde(default)]
    pub memory_gib: Option<f64>,
    /// Where shards have nodes of their own; without it they are on those of the workers.
    #[serde(default)]
    pub partition: Option<String>,
    /// More options of sbatch, for those nodes.
    #[serde(default)]
    pub options: Vec<String>,
}

impl Site {
    /// Fails on values that no job can have.
    ///
    /// # Errors
    /// [`Error::Site`].
    pub fn check(&self) -> Result<()> {
        for (key, found) in [
            ("worker.per_node", self.worker.per_node),
            ("worker.cpus", self.worker.cpus),
            ("shard.per_node", self.shard.per_node),
            ("shard.cpus", self.shard.cpus),
        ] {
            if found == 0 {
                return Err(setting(key, "at least 1", "0"));
            }
        }
        for (key, found) in
            [("worker.memory_gib", self.worker.memory_gib), ("shard.memory_gib", self.shard.memory_gib)]
        {
            if let Some(found) = found.filter(|gib| !(gib.is_finite() && *gib > 0.0)) {
                return Err(setting(key, "a number above 0", found));
            }
        }
        if self.worker.memory_gib.is_some() != self.shard.memory_gib.is_some() {
            return Err(setting(
                "shard.memory_gib",
                "a number where worker.memory_gib has one",
                "one of two",
            ));
        }
        let limit = seconds(&self.time)
            .ok_or_else(|| setting("time", "a limit such as \"24:00:00\" or \"2-00:00:00\"", &self.time))?;
        if u64::from(self.lead_s) >= limit || self.lead_s == 0 {
            return Err(setting("lead_s", format!("from 1 to below the limit of {limit} s"), self.lead_s));
        }
        let names = [("partition", &self.partition), ("account", &self.account)];
        for (key, name) in names.into_iter().chain([("shard.partition", &self.shard.partition)]) {
            let is_name =
                |name: &&String| name.chars().all(|c| c.is_ascii_alphanumeric() || "._-,".contains(c));
            if let Some(name) = name.as_ref().filter(|name| name.is_empty() || !is_name(name)) {
                return Err(setting(key, "a name of letters, digits and ._-", name));
            }
        }
        if self.shard.partition.is_none() && !self.shard.options.is_empty() {
            return Err(setting("shard.options", "none without shard.partition", &self.shard.options[0]));
        }
        for (key, options) in [("options", &self.options), ("shard.options", &self.shard.options)] {
            let is_option = |option: &&String| option.starts_with('-') && !option.contains('\n');
            if let Some(found) = options.iter().find(|option| !is_option(option)) {
                return Err(setting(key, "options of sbatch such as \"--qos=long\"", found));
            }
        }
        Ok(())
    }

    /// How many groups of `n` ports there are, one for each job that may share a node with others.
    pub(super) fn groups_of_ports(&self, n: usize) -> Result<usize> {
        let (first, last) = self.ports;
        let groups = (usize::from(last) + 1).saturating_sub(usize::from(first)) / n;
        match groups {
            0 => Err(setting("ports", format!("at least {n}"), format!("{first} to {last}"))),
            groups => Ok(groups),
        }
    }
}

pub(super) fn setting(key: &'static str, expected: impl ToString, found: impl ToString) -> Error {
    Error::Site { section: "slurm", key, expected: expected.to_string(), found: found.to_string() }
}

/// Of a time as Slurm reads it: `M`, `M:S`, `H:M:S`, `D-H`, `D-H:M` or `D-H:M:S`.
fn seconds(text: &str) -> Option<u64> {
    let (days, rest) = match text.split_once('-') {
        Some((days, rest)) => (Some(days.parse::<u64>().ok()?), rest),
        None => (None, text),
    };
    let parts: Vec<u64> = rest.split(':').map(|part| part.parse().ok()).collect::<Option<_>>()?;
    let (h, m, s) = match (days.is_some(), parts.as_slice()) {
        (_, [h, m, s]) => (*h, *m, *s),
        (true, [h, m]) => (*h, *m, 0),
        (true, [h]) => (*h, 0, 0),
        (false, [m, s]) => (0, *m, *s),
        (false, [m]) => (0, *m, 0),
        _ => return None,
    };
    let of = |n: u64, unit: u64| n.checked_mul(unit);
    of(days.unwrap_or(0), 86_400)?.checked_add(of(h, 3600)?)?.checked_add(of(m, 60)?)?.checked_add(s)
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;

    pub(in crate::slurm) fn site() -> Site {
        Site {
            partition: Some("main".into()),
            account: None,
            time: "01:00:00".into(),
            lead_s: 120,
            ports: (20_000, 29_999),
            setup: vec![],
            options: vec![],
            worker: WorkerSite { per_node: 1, cpus: 1, gpus: 0, memory_gib: None },
            shard: ShardSite { per_node: 1, cpus: 1, memory_gib: None, partition: None, options: vec![] },
        }
    }

    #[test]
    fn times_are_as_slurm_reads_them() {
        for (text, expected) in [
            ("90", Some(5400)),
            ("2:30", Some(150)),
            ("24:00:00", Some(86_400)),
            ("2-12", Some(216_000)),
            ("1-0:30", Some(88_200)),
            ("1-00:00:01", Some(86_401)),
            ("", None),
            ("UNLIMITED", None),
            ("1:2:3:4", None),
            ("1-", None),
        ] {
            assert_eq!(seconds(text), expected, "{text}");
        }
    }

    #[test]
    fn what_no_job_can_have_is_refused() {
        site().check().unwrap();
        let refused = |change: fn(&mut Site)| {
            let mut site = site();
            change(&mut site);
            site.check().unwrap_err().to_string()
        };
        assert_eq!(refused(|s| s.worker.cpus = 0), "slurm.worker.cpus: expected at least 1, found 0");
        assert_eq!(
            refused(|s| s.shard.memory_gib = Some(-1.0)),
            "slurm.shard.memory_gib: expected a number above 0, found -1"
        );
        assert_eq!(
            refused(|s| s.worker.memory_gib = Some(1.0)),
            "slurm.shard.memory_gib: expected a number where worker.memory_gib has one, found one of two"
        );
        assert_eq!(
            refused(|s| s.time = "soon".into()),
            "slurm.time: expected a limit such as \"24:00:00\" or \"2-00:00:00\", found soon"
        );
        assert_eq!(
            refused(|s| s.lead_s = 3600),
            "slurm.lead_s: expected from 1 to below the limit of 3600 s, found 3600"
        );
        assert_eq!(
            refused(|s| s.partition = Some("a b".into())),
            "slurm.partition: expected a name of letters, digits and ._-, found a b"
        );
        assert_eq!(
            refused(|s| s.options = vec!["qos=long".into()]),
            "slurm.options: expected options of sbatch such as \"--qos=long\", found qos=long"
        );
        assert_eq!(
            refused(|s| s.shard.options = vec!["--x".into()]),
            "slurm.shard.options: expected none without shard.partition, found --x"
        );
    }
}
