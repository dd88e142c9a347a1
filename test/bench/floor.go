package main

import (
	"context"
	"fmt"
	"sync"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/apimachinery/pkg/watch"
	"k8s.io/client-go/metadata"

	"github.com/imps-node/imps/pkg/api/v1alpha1"
	"github.com/imps-node/imps/pkg/dockerconfig"
	impsync "github.com/imps-node/imps/pkg/sync"
	"github.com/imps-node/imps/test/imps"
)

// floor is what the API server itself allows: the same Secrets in the same namespaces,
// written by plain clients before imps runs. Times are in milliseconds.
type floor struct {
	// Apply is one apply after the other, from sending it to its answer; ApplyPaced the same
	// at the rate of the triggers.
	Apply      latency `json:"applyMilliseconds"`
	ApplyPaced latency `json:"applyPacedMilliseconds"`
	// Event is from the answer of a paced apply to its event at the watcher. EventBusy is
	// the same with all clients at work: the watcher must not be what is measured.
	Event     latency `json:"eventMilliseconds"`
	EventBusy latency `json:"eventBusyMilliseconds"`
	// Create, Change and Delete are from the first request to the last event.
	Create float64 `json:"createMilliseconds"`
	Change float64 `json:"changeMilliseconds"`
	Delete float64 `json:"deleteMilliseconds"`
	// CPU are the seconds that each process has used for these three, by "create" and so on.
	CPU map[string]map[string]float64 `json:"cpuSeconds"`
}

// plain are clients that do nothing but write.
type plain struct {
	client      metadata.Interface
	first, next impsync.Target

	mu    sync.Mutex
	there map[string]*metav1.PartialObjectMetadata
}

// measureFloor measures the floor, after a round in which everything gets warm that can.
func (b *bench) measureFloor(ctx context.Context) (f floor, err error) {
	const owner = "floor" // asks for nothing; without one, the garbage collector would take the Secrets
	if err := b.control.Apply(ctx, []byte("{apiVersion: images.banzaicloud.io/v1alpha1, kind: ImagePullSecret, metadata: {name: "+owner+"}}")); err != nil {
		return f, err
	}
	resource, err := b.read(ctx, owner)
	if err != nil {
		return f, err
	}
	p := &plain{there: map[string]*metav1.PartialObjectMetadata{}}
	if p.client, err = metadata.NewForConfig(b.connection()); err != nil {
		return f, err
	}
	if p.first, err = target(resource, 1, "first"); err != nil {
		return f, err
	}
	if p.next, err = target(resource, 2, "next"); err != nil {
		return f, err
	}

	all := append(b.podNamespaces(), b.labelNamespaces()...)
	some := all[:min(len(all), 200)]
	interval := time.Duration(float64(time.Second) / b.settings.rate)
	burst := func(kind watch.EventType, namespaces []string, write func(context.Context, string) error) (wall float64, lag latency, err error) {
		_, lag, wall, err = b.plainly(ctx, kind, namespaces, inFlight, 0, write)
		return wall, lag, err
	}
	round := func(namespaces []string) (err error) {
		f.CPU = map[string]map[string]float64{}
		if f.CPU["create"], err = used(func() (err error) { f.Create, f.EventBusy, err = burst(watch.Added, namespaces, p.create); return err }); err != nil {
			return err
		}
		if f.CPU["change"], err = used(func() (err error) { f.Change, _, err = burst(watch.Modified, namespaces, p.change); return err }); err != nil {
			return err
		}
		f.CPU["delete"], err = used(func() (err error) { f.Delete, _, err = burst(watch.Deleted, namespaces, p.delete); return err })
		return err
	}
	if err := round(all[:min(len(all), 1000)]); err != nil {
		return f, err
	}
	if f.Apply, _, _, err = b.plainly(ctx, watch.Added, some, 1, 0, p.create); err != nil {
		return f, err
	}
	if _, _, err = burst(watch.Deleted, some, p.delete); err != nil {
		return f, err
	}
	if f.ApplyPaced, f.Event, _, err = b.plainly(ctx, watch.Added, some, 0, interval, p.create); err != nil {
		return f, err
	}
	if _, _, err = burst(watch.Deleted, some, p.delete); err != nil {
		return f, err
	}
	if err := round(all); err != nil {
		return f, err
	}
	return f, b.deleteNamed(ctx, owner)
}

// plainly writes in every namespace and returns how long each write took, how much later
// its event came, and how long it was from the first request to the last event.
func (b *bench) plainly(ctx context.Context, kind watch.EventType, namespaces []string, limit int, interval time.Duration, write func(context.Context, string) error) (took, lag latency, wall float64, err error) {
	seen := b.watcher.expect(kind, namespaces)
	begin := time.Now()
	calls, err := callAll(ctx, namespaces, limit, interval, write)
	if err == nil {
		err = seen.wait(ctx)
	}
	if err != nil {
		return took, lag, 0, err
	}
	var times []time.Duration
	for _, c := range calls {
		times = append(times, c.replied.Sub(c.sent))
	}
	all := latencyOf(seen.since(func(string) time.Time { return begin }))
	return latencyOf(times), latencyOf(seen.since(func(namespace string) time.Time { return calls[namespace].replied })), all.Max, nil
}

// target returns what imps would write for a resource.
func target(owner *v1alpha1.ImagePullSecret, counter uint64, password string) (impsync.Target, error) {
	config, _, err := dockerconfig.Parse(string(corev1.SecretTypeDockerConfigJson),
		map[string][]byte{corev1.DockerConfigJsonKey: dockerConfig(password)})
	if err != nil {
		return impsync.Target{}, fmt.Errorf("parse the plain clients' credentials: %w", err)
	}
	rendered, err := config.Render()
	if err != nil {
		return impsync.Target{}, fmt.Errorf("render the plain clients' credentials: %w", err)
	}
	return impsync.NewTarget(impsync.RefOf(owner), v1alpha1.TargetSecretSpec{Name: imps.SecretName}, counter, rendered)
}

func (p *plain) create(ctx context.Context, namespace string) error {
	return p.apply(ctx, namespace, p.first.Body("", impsync.Absent), false)
}

func (p *plain) change(ctx context.Context, namespace string) error {
	m := p.known(namespace)
	return p.apply(ctx, namespace, p.next.Body(m.UID, m.ResourceVersion), true)
}

func (p *plain) apply(ctx context.Context, namespace string, body []byte, force bool) error {
	m, err := p.client.Resource(impsync.SecretResource).Namespace(namespace).
		Patch(ctx, imps.SecretName, types.ApplyPatchType, body, metav1.PatchOptions{FieldManager: impsync.FieldManager, Force: &force})
	if err != nil {
		return err
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	p.there[namespace] = m
	return nil
}

func (p *plain) delete(ctx context.Context, namespace string) error {
	m := p.known(namespace)
	return p.client.Resource(impsync.SecretResource).Namespace(namespace).Delete(ctx, imps.SecretName, metav1.DeleteOptions{
		Preconditions: &metav1.Preconditions{UID: &m.UID, ResourceVersion: &m.ResourceVersion},
	})
}

func (p *plain) known(namespace string) *metav1.PartialObjectMetadata {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.there[namespace]
}
