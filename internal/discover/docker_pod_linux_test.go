package discover

import (
	"maps"
	"testing"

	"github.com/google/go-cmp/cmp"

	"imdsgate/internal/workload"
)

// podLabels are those that cri-dockerd sets on a container of a pod, and more.
func podLabels(role, namespace, uid string, more map[string]string) map[string]string {
	m := map[string]string{
		"io.kubernetes.container.name": "POD", podRole: role, "io.kubernetes.pod.name": "web-0",
		podNamespace: namespace, podUID: uid, "annotation.kubernetes.io/config.source": "api",
	}
	maps.Copy(m, more)
	return m
}

func TestPods(t *testing.T) {
	given := func(m map[string]string) func(*dockerContainer) {
		return func(c *dockerContainer) { c.labels = m; c.sortLabels(nil) }
	}
	fromImage := func(m map[string]string) func(*dockerContainer) {
		return func(c *dockerContainer) { c.labels = m; c.sortLabels(m) }
	}
	notKnown := func(m map[string]string) func(*dockerContainer) {
		return func(c *dockerContainer) { c.labels, c.brought = m, m }
	}
	app := map[string]string{"app": "web", "app.kubernetes.io/name": "web"}
	box := ctr("a", mode("none"), given(podLabels(roleSandbox, "shop", "1", app)))
	in := mode("container:a")
	without := podLabels(roleContainer, "shop", "1", nil)
	for _, tc := range []struct {
		name string
		c    dockerContainer
		want *workload.Pod
	}{
		{"sandbox", box, &workload.Pod{Namespace: "shop", Labels: app}},
		{"container_has_its_sandboxes_labels", ctr("b", in, given(without)), &workload.Pod{Namespace: "shop", Labels: app}},
		{"container_of_another_pod_in_this_sandbox", ctr("b", in, given(podLabels(roleContainer, "shop", "2", nil))), &workload.Pod{Namespace: "shop"}},
		{"container_without_sandbox", ctr("b", mode("container:x"), given(without)), &workload.Pod{Namespace: "shop"}},
		{"container_with_pod_labels_of_its_own", ctr("b", mode("none"), given(podLabels(roleContainer, "shop", "1", app))), &workload.Pod{Namespace: "shop"}},
		{"image_claims_pod", ctr("b", in, fromImage(podLabels(roleContainer, "shop", "1", app))), &workload.Pod{Namespace: "shop", Labels: app, Claimed: true}},
		{"image_is_not_known", ctr("b", in, notKnown(without)), &workload.Pod{Namespace: "shop", Labels: app, Claimed: true}},
		{"image_hides_the_pod_from_a_deny", ctr("b", mode("none"), func(c *dockerContainer) {
			c.labels = without
			c.sortLabels(map[string]string{podRole: roleContainer})
		}), &workload.Pod{Namespace: "shop", Claimed: true}},
		{"joiner_without_labels", ctr("b", in), nil},
		{"namespace_alone", ctr("b", in, given(map[string]string{podNamespace: "shop"})), nil},
		{"role_that_there_is_not", ctr("b", in, given(podLabels("x", "shop", "1", nil))), nil},
		{"image_claims_the_namespace_runner_the_rest", ctr("b", in, func(c *dockerContainer) {
			c.labels = without
			c.sortLabels(map[string]string{podNamespace: "shop"})
		}), &workload.Pod{Namespace: "shop", Labels: app, Claimed: true}},
	} {
		t.Run(tc.name, func(t *testing.T) {
			v := &view{containers: map[string]dockerContainer{"a": box, tc.c.id: tc.c}}
			w := v.workload(tc.c)
			if diff := cmp.Diff(tc.want, w.Pod); diff != "" {
				t.Errorf("-want +got:\n%s", diff)
			}
			if _, ok := w.Labels["annotation.kubernetes.io/config.source"]; ok && w.Pod != nil {
				t.Error("an annotation passes for a label")
			}
			if w.Pod != nil && !w.Pod.Claimed && w.Labels[podUID] == "" {
				t.Errorf("labels are lost: %v", w.Labels)
			}
		})
	}
}
