//! Templates of pods.

use super::words::{
    is_label_key, is_label_value, is_name, is_part_of_host, is_port_name, is_variable, quantity,
};
use super::{All, labels};
use crate::Result;
use crate::kubernetes::check::node::Node;

const PROBES: [&str; 3] = ["startupProbe", "livenessProbe", "readinessProbe"];

impl All<'_> {
    /// A template.
    pub(super) fn pod(&self, template: &Node) -> Result<()> {
        labels(&template.get("metadata.labels"))?;
        let spec = template.get("spec");
        for (key, value) in spec.get("nodeSelector").entries() {
            value.is("the value of a label", is_label_value)?;
            if !is_label_key(key) {
                return Err(value.wrong("a label whose key is a name, perhaps after a DNS name and /"));
            }
        }
        for toleration in spec.get("tolerations").items() {
            toleration.get("operator").one_of(&["Exists", "Equal"])?;
            let effect = toleration.get("effect");
            if effect.is_there() {
                effect.one_of(&["NoSchedule", "PreferNoSchedule", "NoExecute"])?;
            }
        }
        for spread in spec.get("topologySpreadConstraints").items() {
            spread.get("maxSkew").number(1, i64::from(i32::MAX))?;
            spread.get("whenUnsatisfiable").one_of(&["ScheduleAnyway", "DoNotSchedule"])?;
            super::same_labels(&spread.get("labelSelector.matchLabels"), template)?;
        }
        for key in ["serviceAccountName", "priorityClassName"] {
            let name = spec.get(key);
            if name.is_there() {
                name.is("a DNS name (lower-case letters, digits, - and .)", is_name)?;
            }
        }
        for secret in spec.get("imagePullSecrets").items() {
            self.reference(&secret.get("name"), "Secret")?;
        }
        self.volumes(&spec)?;
        let containers = [spec.get("containers").items(), spec.get("initContainers").items()].concat();
        Node::all_differ(containers.iter().map(|container| container.get("name")))?;
        let names = |key: &str| {
            containers.iter().flat_map(|c| c.get("ports").items()).map(|p| p.get(key)).collect::<Vec<_>>()
        };
        Node::all_differ(names("name"))?;
        Node::all_differ(names("containerPort"))?;
        containers.iter().try_for_each(|container| self.container(container, &spec))
    }

    /// The name of an object that these manifests make, or that the cluster has.
    fn reference(&self, name: &Node, kind: &str) -> Result<()> {
        let text = name.is("a DNS name (lower-case letters, digits, - and .)", is_name)?;
        match self.find(kind, text).is_some() || self.is_given(kind, text) {
            true => Ok(()),
            false => Err(name.wrong(format!("the name of a {kind} of these manifests or of the site"))),
        }
    }

    fn volumes(&self, spec: &Node) -> Result<()> {
        let volumes = spec.get("volumes").items();
        Node::all_differ(volumes.iter().map(|volume| volume.get("name")))?;
        for volume in volumes {
            volume.get("name").is("a DNS label (lower-case letters, digits and -)", is_part_of_host)?;
            let sources: Vec<_> = volume.entries().into_iter().filter(|(key, _)| *key != "name").collect();
            let [(kind, source)] = &sources[..] else {
                return Err(volume.wrong(format!("one source (there are {})", sources.len())));
            };
            match *kind {
                "configMap" => self.reference(&source.get("name"), "ConfigMap")?,
                "secret" => self.reference(&source.get("secretName"), "Secret")?,
                "persistentVolumeClaim" => {
                    self.reference(&source.get("claimName"), "PersistentVolumeClaim")?
                }
                "emptyDir" => {
                    let (medium, size) = (source.get("medium"), source.get("sizeLimit"));
                    if medium.is_there() {
                        medium.one_of(&["Memory"])?;
                    }
                    if size.is_there() {
                        amount(&size)?;
                    }
                }
                "ephemeral" => claim(&source.get("volumeClaimTemplate.spec"))?,
                _ => {
                    return Err(
                        source.wrong("a configMap, emptyDir, ephemeral, persistentVolumeClaim or secret")
                    );
                }
            }
        }
        Ok(())
    }

    fn container(&self, container: &Node, spec: &Node) -> Result<()> {
        container.get("name").is("a DNS label (lower-case letters, digits and -)", is_part_of_host)?;
        container
            .get("image")
            .is("an image", |image| !image.is_empty() && !image.contains(char::is_whitespace))?;
        for port_of_it in container.get("ports").items() {
            port(&port_of_it.get("containerPort"))?;
            port_of_it.get("name").is("the name of a port", is_port_name)?;
        }
        for (name, request) in container.get("resources.requests").entries() {
            let (least, limit) = (amount(&request)?, container.get("resources.limits").value[name].as_str());
            if limit.and_then(quantity).is_some_and(|most| most < least) {
                return Err(request.wrong(format!("no more than its limit, {}", limit.unwrap_or_default())));
            }
        }
        for (_, limit) in container.get("resources.limits").entries() {
            amount(&limit)?;
        }
        for key in PROBES {
            probe(&container.get(key), container)?;
        }
        mounts(&container.get("volumeMounts").items(), spec)?;
        for secret in container.get("envFrom").items() {
            self.reference(&secret.get("secretRef.name"), "Secret")?;
        }
        variables(container)
    }
}

/// A claim that is made for a pod.
fn claim(spec: &Node) -> Result<()> {
    const MODES: [&str; 4] = ["ReadOnlyMany", "ReadWriteMany", "ReadWriteOnce", "ReadWriteOncePod"];
    for mode in spec.get("accessModes").items() {
        mode.one_of(&MODES)?;
    }
    spec.get("storageClassName").is("a DNS name (lower-case letters, digits, - and .)", is_name)?;
    amount(&spec.get("resources.requests.storage")).map(|_| ())
}

/// Volumes that a container sees, each of which the pod has.
fn mounts(mounts: &[Node], spec: &Node) -> Result<()> {
    Node::all_differ(mounts.iter().map(|mount| mount.get("mountPath")))?;
    let volumes = spec.get("volumes").items();
    for mount in mounts {
        let name = mount.get("name");
        if !volumes.iter().any(|volume| volume.get("name").value == name.value) {
            return Err(name.wrong("the name of a volume of the pod"));
        }
        let rule = |path: &str| path.starts_with('/') && path.len() > 1 && !path.contains(':');
        mount.get("mountPath").is("an absolute path without a colon, not /", rule)?;
    }
    Ok(())
}

/// Variables, and those that arguments name as `$(NAME)`.
fn variables(container: &Node) -> Result<()> {
    let variables = container.get("env").items();
    Node::all_differ(variables.iter().map(|variable| variable.get("name")))?;
    for variable in &variables {
        variable.get("name").is("the name of a variable", is_variable)?;
        if variable.get("value").is_there() == variable.get("valueFrom").is_there() {
            return Err(variable.wrong("one of value and valueFrom"));
        }
    }
    for arg in container.get("args").items() {
        for used in arg.text()?.split("$(").skip(1) {
            let used = used.split(')').next().unwrap_or_default();
            if !variables.iter().any(|variable| variable.get("name").value == used) {
                return Err(arg.wrong(format!("variables of the container, which has no {used}")));
            }
        }
    }
    Ok(())
}

fn probe(probe: &Node, container: &Node) -> Result<()> {
    const HANDLERS: [&str; 4] = ["exec", "grpc", "httpGet", "tcpSocket"];
    if !probe.is_there() {
        return Ok(());
    }
    let handlers: Vec<_> = HANDLERS.into_iter().filter(|handler| probe.get(handler).is_there()).collect();
    let [handler] = handlers[..] else {
        let found = if handlers.is_empty() { "none".to_owned() } else { handlers.join(" and ") };
        return Err(probe.wrong(format!("one of {} (there is {found})", HANDLERS.join(", "))));
    };
    for key in ["periodSeconds", "failureThreshold", "timeoutSeconds"] {
        let number = probe.get(key);
        if number.is_there() {
            number.number(1, i64::from(i32::MAX))?;
        }
    }
    match handler {
        "httpGet" | "tcpSocket" => port_of(&probe.get(handler).get("port"), std::slice::from_ref(container)),
        "grpc" => port(&probe.get("grpc.port")).map(|_| ()),
        _ => Ok(()),
    }
}

pub(super) fn port(port: &Node) -> Result<i64> {
    port.number(1, i64::from(u16::MAX))
}

/// A port by number, or by the name that one of the containers gives it.
pub(super) fn port_of(found: &Node, containers: &[Node]) -> Result<()> {
    let Some(name) = found.value.as_str() else { return port(found).map(|_| ()) };
    let mut ports = containers.iter().flat_map(|container| container.get("ports").items());
    match ports.any(|port| port.get("name").value == name) {
        true => Ok(()),
        false => Err(found.wrong("a number, or the name of a port of the container")),
    }
}

/// A rule of what an end of a pod means.
pub(super) fn failure_rule(rule: &Node, template: &Node) -> Result<()> {
    rule.get("action").one_of(&["Count", "FailIndex", "FailJob", "Ignore"])?;
    let (codes, conditions) = (rule.get("onExitCodes"), rule.get("onPodConditions"));
    if codes.is_there() != conditions.items().is_empty() {
        return Err(rule.wrong("one of onExitCodes and onPodConditions"));
    }
    if !codes.is_there() {
        let mut items = conditions.items().into_iter();
        return items.try_for_each(|condition| condition.get("status").one_of(&["True", "False", "Unknown"]));
    }
    codes.get("operator").one_of(&["In", "NotIn"])?;
    let values = codes.get("values");
    let numbers = values.items().iter().map(|value| value.number(0, 255)).collect::<Result<Vec<_>>>()?;
    if numbers.is_empty()
        || !numbers.is_sorted_by(|a, b| a < b)
        || (codes.get("operator").value == "In" && numbers[0] == 0)
    {
        return Err(values.wrong("exit codes in ascending order, once each, and none of success"));
    }
    let name = codes.get("containerName");
    let containers = template.get("spec.containers").items();
    match containers.iter().any(|container| container.get("name").value == name.value) {
        true => Ok(()),
        false => Err(name.wrong("the name of a container of the template")),
    }
}

fn amount(node: &Node) -> Result<f64> {
    let text = node.text()?;
    quantity(text).ok_or_else(|| node.wrong("a quantity above 0, such as 500m, 8 or 64Gi"))
}
