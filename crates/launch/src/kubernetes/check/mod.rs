//! What a cluster would refuse, or take and never run, though its form is right: names, ports, quantities,
//! words, selectors and references of all manifests together. What the form is, their schemas say.

mod node;
mod pod;
mod words;

use serde_json::Value;

use crate::Result;
use node::Node;
use words::{MAX_LABEL, is_label, is_label_key, is_label_value, is_name};

/// Fails on the first manifest that is wrong. `given` are the objects, by kind and name, that the cluster has
/// beside them.
///
/// # Errors
/// Names the manifest and the path in it, what was expected there and what was found.
pub fn check(manifests: &[Value], given: &[(&str, String)]) -> Result<()> {
    let names: Vec<String> = manifests
        .iter()
        .map(|manifest| {
            let text = |value: &Value| value.as_str().unwrap_or("?").to_owned();
            format!("{} {}", text(&manifest["kind"]), text(&manifest["metadata"]["name"]))
        })
        .collect();
    let roots: Vec<Node> = names.iter().zip(manifests).map(|(name, value)| Node::root(name, value)).collect();
    let all = All { roots: &roots, given };
    for (i, root) in roots.iter().enumerate() {
        if names[..i].contains(&names[i]) {
            return Err(root.get("metadata.name").wrong("a name that no other of this kind has"));
        }
        all.metadata(root)?;
    }
    for root in &roots {
        match root.get("kind").text()? {
            "ConfigMap" => config_map(root)?,
            "Service" => all.service(root)?,
            "StatefulSet" => all.stateful_set(root)?,
            "PodDisruptionBudget" => all.disruption_budget(root)?,
            "JobSet" => all.job_set(root)?,
            _ => return Err(root.get("kind").wrong("a kind that is known here")),
        }
    }
    Ok(())
}

/// All manifests, and what the cluster has beside them.
struct All<'a> {
    roots: &'a [Node<'a>],
    given: &'a [(&'a str, String)],
}

impl<'a> All<'a> {
    fn find(&self, kind: &str, name: &str) -> Option<&Node<'a>> {
        self.roots
            .iter()
            .find(|root| root.get("kind").value == kind && root.get("metadata.name").value == name)
    }

    fn is_given(&self, kind: &str, name: &str) -> bool {
        self.given.iter().any(|given| (given.0, given.1.as_str()) == (kind, name))
    }

    /// The templates of pods, of all sets.
    fn templates(&self) -> Vec<Node<'a>> {
        let of = |root: &Node<'a>| match root.value["kind"].as_str() {
            Some("StatefulSet") => vec![root.get("spec.template")],
            Some("JobSet") => {
                let jobs = root.get("spec.replicatedJobs").items();
                jobs.iter().map(|job| job.get("template.spec.template")).collect()
            }
            _ => vec![],
        };
        self.roots.iter().flat_map(of).collect()
    }

    fn metadata(&self, root: &Node) -> Result<()> {
        root.get("apiVersion").text()?;
        let name = root.get("metadata.name");
        match root.value["kind"].as_str() {
            // Their pods, or they themselves, are hosts of these names.
            Some("Service" | "StatefulSet" | "JobSet") => {
                name.is("a DNS label (lower-case letters, digits and -, a letter first)", is_label)?
            }
            _ => name.is("a DNS name (lower-case letters, digits, - and .)", is_name)?,
        };
        let namespace = root.get("metadata.namespace");
        namespace.is("a DNS label (lower-case letters, digits and -, a letter first)", is_label)?;
        let first = &self.roots[0].get("metadata.namespace");
        if namespace.value != first.value {
            return Err(namespace.wrong(format!("the namespace of the others, {}", first.value)));
        }
        labels(&root.get("metadata.labels"))
    }

    /// Pods that a selector finds, one of which there must be.
    fn selected(&self, selector: &Node) -> Result<Vec<Node<'a>>> {
        labels(selector)?;
        let fits = |template: &Node| {
            let found = template.get("metadata.labels");
            selector.entries().iter().all(|(key, value)| &found.value[*key] == value.value)
        };
        let selected: Vec<Node> = self.templates().into_iter().filter(fits).collect();
        match selected.is_empty() || selector.entries().is_empty() {
            true => Err(selector.wrong("labels that some pods have")),
            false => Ok(selected),
        }
    }

    fn service(&self, root: &Node) -> Result<()> {
        let spec = root.get("spec");
        let pods = self.selected(&spec.get("selector"))?;
        let ports = spec.get("ports").items();
        Node::all_differ(ports.iter().map(|port| port.get("name")))?;
        Node::all_differ(ports.iter().map(|port| port.get("port")))?;
        for port in ports {
            port.get("name").is("the name of a port", words::is_port_name)?;
            pod::port(&port.get("port"))?;
            for found in &pods {
                pod::port_of(&port.get("targetPort"), &found.get("spec.containers").items())?;
            }
        }
        Ok(())
    }

    fn stateful_set(&self, root: &Node) -> Result<()> {
        let spec = root.get("spec");
        let replicas = spec.get("replicas").number(1, i64::from(i32::MAX))?;
        spec.get("podManagementPolicy").one_of(&["OrderedReady", "Parallel"])?;
        let service = spec.get("serviceName");
        match self.find("Service", service.text()?) {
            Some(found) if found.get("spec.clusterIP").value == "None" => {}
            _ => {
                return Err(
                    service.wrong("a service of these manifests without an address (clusterIP: None)")
                );
            }
        }
        let (selector, template) = (spec.get("selector.matchLabels"), spec.get("template"));
        same_labels(&selector, &template)?;
        let name = root.get("metadata.name");
        // The label of its revision has 10 characters more, those of its pods their number.
        let longest = name.text()?.len() + 1 + 10.max((replicas - 1).to_string().len());
        if longest > MAX_LABEL {
            return Err(name.wrong(format!("{} characters less", longest - MAX_LABEL)));
        }
        let policy = template.get("spec.restartPolicy");
        if policy.is_there() {
            policy.one_of(&["Always"])?;
        }
        self.pod(&template)
    }

    fn disruption_budget(&self, root: &Node) -> Result<()> {
        let spec = root.get("spec");
        self.selected(&spec.get("selector.matchLabels"))?;
        let bounds = [spec.get("minAvailable"), spec.get("maxUnavailable")];
        match bounds.iter().filter(|bound| bound.is_there()).count() {
            1 => {}
            n => return Err(spec.wrong(format!("one of minAvailable and maxUnavailable (there are {n})"))),
        }
        bounds
            .iter()
            .filter(|bound| bound.is_there())
            .try_for_each(|bound| bound.number(0, i64::from(i32::MAX)).map(|_| ()))
    }

    fn job_set(&self, root: &Node) -> Result<()> {
        let spec = root.get("spec");
        let host = spec.get("network.subdomain");
        let host = host.is("a DNS label (lower-case letters, digits and -, a letter first)", is_label)?;
        // Its controller makes a service of that name.
        if let Some(taken) = self.find("Service", host) {
            return Err(taken
                .get("metadata.name")
                .wrong(format!("another name than the JobSet's service, {host}")));
        }
        let jobs = spec.get("replicatedJobs");
        if jobs.items().is_empty() {
            return Err(jobs.wrong("one job at least"));
        }
        Node::all_differ(jobs.items().iter().map(|job| job.get("name")))?;
        jobs.items().iter().try_for_each(|job| self.job(root, job))
    }

    /// One of a JobSet's jobs.
    fn job(&self, set: &Node, job: &Node) -> Result<()> {
        let most = i64::from(i32::MAX);
        let (spec, name) = (job.get("template.spec"), job.get("name"));
        let replicas = job.get("replicas").number(1, most)?;
        let completions = spec.get("completions").number(1, most)?;
        spec.get("completionMode").one_of(&["Indexed"])?;
        spec.get("podReplacementPolicy").one_of(&["Failed", "TerminatingOrFailed"])?;
        spec.get("backoffLimit").number(0, most)?;
        let parallelism = spec.get("parallelism");
        if parallelism.value != spec.get("completions").value {
            return Err(parallelism.wrong(format!("all {completions} of completions: they work together")));
        }
        let set_name = set.get("metadata.name").text()?;
        let longest = format!("{set_name}-{}-{}-{}-abcde", name.text()?, replicas - 1, completions - 1);
        if longest.len() > MAX_LABEL || !is_label(&longest) {
            return Err(
                name.wrong(format!("one with which names of pods, such as {longest}, are DNS labels"))
            );
        }
        let template = spec.get("template");
        let policy = template.get("spec.restartPolicy");
        match spec.get("podFailurePolicy").is_there() {
            true => policy.one_of(&["Never"])?,
            false => policy.one_of(&["Never", "OnFailure"])?,
        }
        for rule in spec.get("podFailurePolicy.rules").items() {
            pod::failure_rule(&rule, &template)?;
        }
        self.pod(&template)
    }
}

fn labels(labels: &Node) -> Result<()> {
    for (key, value) in labels.entries() {
        value.is("the value of a label", is_label_value)?;
        if !is_label_key(key) {
            return Err(value.wrong("a label whose key is a name, perhaps after a DNS name and /"));
        }
    }
    Ok(())
}

/// A selector must find the pods of its own template.
fn same_labels(selector: &Node, template: &Node) -> Result<()> {
    if selector.entries().is_empty() {
        return Err(selector.wrong("labels of the template"));
    }
    for (key, value) in selector.entries() {
        let found = &template.get("metadata.labels").value[key];
        if found != value.value {
            return Err(value.wrong(format!("the label of the template, {found}")));
        }
    }
    Ok(())
}

fn config_map(root: &Node) -> Result<()> {
    /// All of one, as etcd holds it.
    const MOST: usize = 1 << 20;
    let size: usize =
        root.get("data").entries().iter().filter_map(|(_, value)| value.value.as_str()).map(str::len).sum();
    match size <= MOST {
        true => Ok(()),
        false => Err(root.get("data").wrong(format!("{MOST} bytes at most (there are {size})"))),
    }
}

#[cfg(test)]
mod tests;
