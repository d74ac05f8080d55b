package discover

import (
	"maps"
	"strings"

	"imdsgate/internal/workload"
)

// What the kubelet, and cri-dockerd or the dockershim before it, set on a pod's
// containers, over whatever the pod's author has set. The sandbox has the pod's
// labels besides, and all have annotations, as labels.
const (
	podNamespace  = "io.kubernetes.pod.namespace"
	podUID        = "io.kubernetes.pod.uid"
	podRole       = "io.kubernetes.docker.type"
	roleSandbox   = "podsandbox"
	roleContainer = "container"
	kubeletPrefix = "io.kubernetes."
	notePrefix    = "annotation."
)

// inPod reports whether these labels say that a container is a pod's.
func inPod(labels map[string]string) bool {
	role := labels[podRole]
	return labels[podNamespace] != "" && labels[podUID] != "" && (role == roleSandbox || role == roleContainer)
}

// pod is what Kubernetes says of a container; nil if it does not run it. The labels
// are its sandbox's, whose network it shares. The engine is not told the service
// account. What the image may have said counts as claimed.
func (v *view) pod(c dockerContainer) *workload.Pod {
	said := c.given
	claimed := !inPod(said)
	if claimed {
		said = maps.Clone(c.brought)
		if said == nil {
			said = make(map[string]string)
		}
		maps.Copy(said, c.given)
		if !inPod(said) {
			return nil
		}
	}
	p := &workload.Pod{Namespace: said[podNamespace], Claimed: claimed}
	box, ok := v.root(c)
	if ok && inPod(box.given) && box.given[podRole] == roleSandbox && box.given[podUID] == said[podUID] {
		p.Labels = maps.Clone(box.given)
		maps.DeleteFunc(p.Labels, func(k, _ string) bool {
			return strings.HasPrefix(k, kubeletPrefix) || strings.HasPrefix(k, notePrefix)
		})
	}
	return p
}

// workload is what is known of a container.
func (v *view) workload(c dockerContainer) workload.Workload {
	w := workload.Workload{
		ID: c.workloadID(), Name: c.name, Labels: c.given, ImageLabels: c.brought,
		Image: c.image, ImageID: c.imageKey.id, Pod: v.pod(c),
	}
	if w.Pod != nil { // annotations are no labels, and can be large
		w.Labels = maps.Clone(w.Labels)
		maps.DeleteFunc(w.Labels, func(k, _ string) bool { return strings.HasPrefix(k, notePrefix) })
	}
	return w
}
