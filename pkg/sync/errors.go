package sync

import (
	"context"
	"errors"
	"strings"
	"time"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
)

// ErrorClass says what to do about an error of the API server.
type ErrorClass uint8

// The classes, in the order in which they matter: of errors that are joined, the first
// decides.
const (
	// ClassRetry: passing; try again with backoff.
	ClassRetry ErrorClass = iota
	// ClassConflict: somebody else was faster; read again and decide anew, at once.
	ClassConflict
	// ClassWait: refused for now (rights, policy, quota); look again ever more seldom, in
	// the end every RecheckInterval.
	ClassWait
	// ClassTerminal: refused for what it is; nothing changes until the input does. Looked
	// at again after RecheckInterval all the same, since the server's rules may change.
	ClassTerminal
	// ClassGone: what the write was for is gone or going; forget it quietly.
	ClassGone
)

// String returns the class's name, as metrics show it.
func (c ErrorClass) String() string {
	return [...]string{"retry", "conflict", "refused", "invalid", "gone"}[c]
}

const (
	// RecheckInterval is how long what is refused rests in the end, when nothing else
	// brings it back.
	RecheckInterval = 10 * time.Minute
	// RecheckSoonest is how long it rests at first: an API server that has just started
	// refuses what it has not read the rules for yet.
	RecheckSoonest = time.Second
	// ThrottlePause is how long a worker rests whose request the server did not take for
	// now (429): its requests with other items would fare no better.
	ThrottlePause = time.Second
)

// Pause waits, at most until ctx ends.
func Pause(ctx context.Context, d time.Duration) {
	if d <= 0 {
		return
	}
	timer := time.NewTimer(d)
	defer timer.Stop()
	select {
	case <-timer.C:
	case <-ctx.Done():
	}
}

// ClassifyError sorts an error of a write to the API server.
func ClassifyError(err error) ErrorClass {
	var joined interface{ Unwrap() []error }
	if errors.As(err, &joined) {
		class := ClassGone
		for _, one := range joined.Unwrap() {
			class = min(class, ClassifyError(one))
		}
		return class
	}
	switch {
	case apierrors.HasStatusCause(err, corev1.NamespaceTerminatingCause):
		return ClassGone
	case apierrors.IsNotFound(err):
		return ClassGone
	case apierrors.IsConflict(err), apierrors.IsAlreadyExists(err):
		return ClassConflict
	case apierrors.IsForbidden(err):
		return ClassWait
	case apierrors.IsInvalid(err), apierrors.IsBadRequest(err), apierrors.IsRequestEntityTooLargeError(err),
		apierrors.IsMethodNotSupported(err), apierrors.IsUnsupportedMediaType(err):
		return ClassTerminal
	default:
		return ClassRetry
	}
}

// Explain returns an error of the API server in one short line that is fit for status
// and Events: names and reasons, never a piece of an object. The server's own text of an
// invalid object may quote its values, so of that only the fields are told, and that of a
// request which it cannot decode may quote the request.
func Explain(err error) string {
	if err == nil {
		return ""
	}
	var status apierrors.APIStatus
	if !errors.As(err, &status) {
		return err.Error()
	}
	s := status.Status()
	switch {
	case apierrors.IsInvalid(err):
		return explainInvalid(s.Details)
	case s.Reason == metav1.StatusReasonBadRequest:
		return "the API server cannot read the request"
	case apierrors.IsForbidden(err) && strings.Contains(s.Message, "exceeded quota"):
		return "the namespace's quota is exceeded"
	}
	return s.Message
}

func explainInvalid(details *metav1.StatusDetails) string {
	const invalid = "the API server finds it invalid"
	if details == nil || len(details.Causes) == 0 {
		return invalid
	}
	var fields []string
	for _, cause := range details.Causes {
		switch {
		case cause.Field != "":
			fields = append(fields, string(cause.Type)+" of "+cause.Field)
		case cause.Type == "":
			return cause.Message // a ValidatingAdmissionPolicy's name and message
		default:
			fields = append(fields, string(cause.Type))
		}
	}
	return invalid + ": " + strings.Join(fields, ", ")
}
