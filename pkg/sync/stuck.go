package sync

import (
	"cmp"
	"slices"
	"strings"
	"time"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/types"
)

// StuckPod is a Pod that waits for an image which its node may not pull.
type StuckPod struct {
	Namespace string    `json:"namespace"`
	Name      string    `json:"name"`
	UID       types.UID `json:"uid"`
}

func (p StuckPod) compare(other StuckPod) int {
	return cmp.Or(cmp.Compare(p.Namespace, other.Namespace), cmp.Compare(p.Name, other.Name), cmp.Compare(p.UID, other.UID))
}

// RefusedImages returns the images that keep a Pod in ErrImagePull or ImagePullBackOff, as far as credentials may be what is
// missing, sorted; none where the Pod is going. The reasons are the kubelet's (pkg/kubelet/images/types.go).
func RefusedImages(p *corev1.Pod) (images []string) {
	if p.DeletionTimestamp != nil || p.Status.Phase == corev1.PodSucceeded || p.Status.Phase == corev1.PodFailed {
		return nil
	}
	for _, statuses := range [][]corev1.ContainerStatus{p.Status.InitContainerStatuses, p.Status.ContainerStatuses} {
		for i := range statuses {
			waiting := statuses[i].State.Waiting
			if waiting == nil || waiting.Reason != "ErrImagePull" && waiting.Reason != "ImagePullBackOff" {
				continue
			}
			image := imageOf(p, statuses[i].Name)
			if failure := PullFailureOf(image, waiting.Message); failure == PullRefused || failure == PullNotFound {
				images = append(images, image)
			}
		}
	}
	slices.Sort(images)
	return slices.Compact(images)
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

// PullFailure is why a pull failed.
type PullFailure uint8

const (
	// PullOther is something else, or nothing that is known.
	PullOther PullFailure = iota
	// PullRefused is where the registry refuses the credentials, or asks for some.
	PullRefused
	// PullNotFound is where the registry says that there is no such image, as some do to whoever has no right to it.
	PullNotFound
	// PullUnreachable is where the registry cannot be reached, or is not trusted.
	PullUnreachable
)

// PullFailureOf sorts what a kubelet says about the pull of an image, in the words of containerd, CRI-O and registries.
func PullFailureOf(image, message string) PullFailure {
	message = strings.ToLower(strings.ReplaceAll(message, image, ""))
	has := func(words ...string) bool {
		return slices.ContainsFunc(words, func(word string) bool { return strings.Contains(message, word) })
	}
	switch {
	case has("no such host", "i/o timeout", "connection refused", "connection reset", "no route to host", "network is unreachable",
		"tls: ", "x509: ", "deadline exceeded", "502 bad gateway", "503 service unavailable", "504 gateway timeout"):
		return PullUnreachable
	case has("unauthorized", "forbidden", "denied", "authorization failed", "authentication required", "no basic auth credentials"):
		return PullRefused
	case has("not found", "manifest unknown", "name unknown", "does not exist"):
		return PullNotFound
	default:
		return PullOther
	}
}

// PullSecrets returns the names in an imagePullSecrets, in its order.
func PullSecrets(refs []corev1.LocalObjectReference) (names []string) {
	for _, ref := range refs {
		names = append(names, ref.Name)
	}
	return names
}

// clockSkew is by how much the API server's clock, which a Pod's creation time is of, may be ahead of the coordinator's.
const clockSkew = 5 * time.Minute

// Attached are the Secrets that imps has had a ServiceAccount name, as its annotation says, which users may have edited: names,
// separated by commas.
func Attached(a *corev1.ServiceAccount) (names []string) {
	for name := range strings.SplitSeq(a.Annotations[AnnotationAttached], ",") {
		if name = strings.TrimSpace(name); name != "" && !slices.Contains(names, name) {
			names = append(names, name)
		}
	}
	return names
}

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
	at := AttachedAt(a)
	return at.IsZero() || !p.CreationTimestamp.After(at.Add(clockSkew))
}
