package sync

import (
	"cmp"
	"slices"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/types"
)

// StuckPod is a Pod that an image is missing of, as its pull fails.
type StuckPod struct {
	Namespace string    `json:"namespace"`
	Name      string    `json:"name"`
	UID       types.UID `json:"uid"`
}

func (p StuckPod) compare(other StuckPod) int {
	return cmp.Or(cmp.Compare(p.Namespace, other.Namespace), cmp.Compare(p.Name, other.Name), cmp.Compare(p.UID, other.UID))
}

// FailedPull is a container whose image the kubelet could not pull, and tries to pull again.
type FailedPull struct {
	// Image is what the Pod's spec says.
	Image string
	// Message is the kubelet's own.
	Message string
}

// FailedPulls returns what keeps a Pod in ErrImagePull or ImagePullBackOff, by container; none where it is going.
//
// The reasons are the kubelet's (pkg/kubelet/images/types.go).
func FailedPulls(p *corev1.Pod) map[string]FailedPull {
	if p.DeletionTimestamp != nil || p.Status.Phase == corev1.PodSucceeded || p.Status.Phase == corev1.PodFailed {
		return nil
	}
	var failed map[string]FailedPull
	for _, statuses := range [][]corev1.ContainerStatus{p.Status.InitContainerStatuses, p.Status.ContainerStatuses} {
		for i := range statuses {
			waiting := statuses[i].State.Waiting
			if waiting == nil || waiting.Reason != "ErrImagePull" && waiting.Reason != "ImagePullBackOff" {
				continue
			}
			if failed == nil {
				failed = map[string]FailedPull{}
			}
			failed[statuses[i].Name] = FailedPull{Image: imageOf(p, statuses[i].Name), Message: waiting.Message}
		}
	}
	return failed
}

// imageOf is the image of a container in a Pod's spec: that in its status is what the runtime calls it.
func imageOf(p *corev1.Pod, container string) string {
	for _, containers := range [][]corev1.Container{p.Spec.InitContainers, p.Spec.Containers} {
		if i := slices.IndexFunc(containers, func(c corev1.Container) bool { return c.Name == container }); i >= 0 {
			return containers[i].Image
		}
	}
	return ""
}

// PullSecrets returns the names in an imagePullSecrets, in its order.
func PullSecrets(refs []corev1.LocalObjectReference) (names []string) {
	for _, ref := range refs {
		names = append(names, ref.Name)
	}
	return names
}
