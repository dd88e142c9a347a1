package sync

import (
	"cmp"
	"slices"
	"time"

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

// clockSkew is by how much the API server's clock, which a Pod's creation time is of, may be ahead of the coordinator's.
const clockSkew = time.Minute

// AttachedAt is when imps last had a ServiceAccount name a Secret; zero where it has not.
func AttachedAt(a *corev1.ServiceAccount) time.Time {
	at, err := time.Parse(time.RFC3339, a.Annotations[AnnotationAttachedAt])
	if err != nil {
		return time.Time{}
	}
	return at
}

// CameTooEarly reports whether a Pod may have been admitted before its ServiceAccount named what it names now.
func CameTooEarly(p *corev1.Pod, a *corev1.ServiceAccount) bool {
	return !p.CreationTimestamp.After(AttachedAt(a).Add(clockSkew))
}

// HasOwnPullSecrets reports whether a Pod names a Secret that its ServiceAccount does not. Then it was given a list of its own,
// and gets none of the ServiceAccount's (plugin/pkg/admission/serviceaccount/admission.go).
func HasOwnPullSecrets(p *corev1.Pod, a *corev1.ServiceAccount) bool {
	account := PullSecrets(a.ImagePullSecrets)
	return slices.ContainsFunc(p.Spec.ImagePullSecrets, func(ref corev1.LocalObjectReference) bool { return !slices.Contains(account, ref.Name) })
}
