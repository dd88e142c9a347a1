package faults

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"testing"

	"github.com/stretchr/testify/require"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/watch"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/tools/cache"
	watchtools "k8s.io/client-go/tools/watch"

	impsync "github.com/imps-node/imps/pkg/sync"
	"github.com/imps-node/imps/test/imps"
)

// history watches all target and rendered Secrets, and remembers what must not happen even
// for a moment: that the counter of one goes back.
type history struct {
	mu       sync.Mutex
	counters map[string]uint64 // by Secret and resource
	bad      []error
}

func watchHistory(t *testing.T, core kubernetes.Interface) *history {
	t.Helper()
	h := &history{counters: map[string]uint64{}}
	ctx, stop := context.WithCancel(context.WithoutCancel(t.Context()))
	var watches sync.WaitGroup
	for namespace, options := range map[string]metav1.ListOptions{
		"":                     {FieldSelector: "metadata.name=" + imps.SecretName},
		imps.RenderedNamespace: {LabelSelector: impsync.LabelComponent},
	} {
		secrets := core.CoreV1().Secrets(namespace)
		list, err := secrets.List(ctx, options)
		require.NoError(t, err)
		for i := range list.Items {
			h.observe(&list.Items[i])
		}
		// It goes on where the API server ends a watch, as it does to a client that it finds slow.
		w, err := watchtools.NewRetryWatcherWithContext(ctx, list.ResourceVersion,
			&cache.ListWatch{WatchFuncWithContext: func(ctx context.Context, from metav1.ListOptions) (watch.Interface, error) {
				from.FieldSelector, from.LabelSelector = options.FieldSelector, options.LabelSelector
				return secrets.Watch(ctx, from)
			}})
		require.NoError(t, err)
		watches.Go(func() {
			for event := range w.ResultChan() {
				if secret, ok := event.Object.(*corev1.Secret); ok {
					h.observe(secret)
				}
			}
			if ctx.Err() == nil {
				h.blame(errors.New("the watch has ended: what came after it was not seen"))
			}
		})
	}
	t.Cleanup(func() {
		stop()
		watches.Wait()
		require.NoError(t, h.err())
	})
	return h
}

func (h *history) observe(secret *corev1.Secret) {
	revision, err := impsync.ParseRevision(secret.Annotations[impsync.AnnotationRevision])
	if secret.Type == impsync.RenderedType {
		var r impsync.Rendered
		r, err = impsync.DecodeRendered(secret, impsync.FormatVersions())
		if err == nil {
			revision = r.Target.Revision()
		}
	}
	if err != nil {
		return // not imps's
	}
	key := secret.Namespace + "/" + secret.Name + " of " + string(revision.UID)
	h.mu.Lock()
	defer h.mu.Unlock()
	if was := h.counters[key]; revision.Counter < was {
		h.bad = append(h.bad, fmt.Errorf("%s went back from %d to %d", key, was, revision.Counter))
	}
	h.counters[key] = revision.Counter
}

func (h *history) blame(err error) {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.bad = append(h.bad, err)
}

func (h *history) err() error {
	h.mu.Lock()
	defer h.mu.Unlock()
	return errors.Join(h.bad...)
}
