package explain

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"time"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	corev1client "k8s.io/client-go/kubernetes/typed/core/v1"
	"k8s.io/client-go/rest"

	"github.com/imps-node/imps/pkg/api/v1alpha1"
	"github.com/imps-node/imps/pkg/dockerconfig"
	impsync "github.com/imps-node/imps/pkg/sync"
)

// facts are what the caller may see of everything that matters to a Pod.
type facts struct {
	pod *corev1.Pod
	// template is what its controller would make it anew from, nil where that is not known; seesTemplate: there is none.
	template     *corev1.PodSpec
	seesTemplate bool
	// account is nil where the caller may not see it.
	account *corev1.ServiceAccount
	// namespace is nil where the caller may not see it.
	namespace *corev1.Namespace
	// installed: the cluster knows ImagePullSecrets. listed: the caller may list them.
	installed, listed bool
	resources         []v1alpha1.ImagePullSecret
	// rendered is what resources deliver; of those that the caller may not see there is nothing, and of those that deliver
	// nothing it is zero.
	rendered map[types.UID]impsync.Rendered
	// secrets are those of the Pod's namespace with names that matter, by name; nil where there is none, and no key where
	// the caller may not see it.
	secrets map[string]*secret
	// neighbours are the Pods of the namespace that are bound to a node.
	neighbours []corev1.Pod
	// failures are Events of the kubelet about pulls of the Pod, the last one first.
	failures []failure
	unknown  []string
}

// secret is what is kept of a Secret.
type secret struct {
	existing impsync.Existing
	// owner is the name of the resource that it is of, as its owner reference says.
	owner string
	// written is when imps last wrote it; zero where that is unknown.
	written time.Time
	// credentials are what it holds; err where that is nothing that a kubelet could use.
	credentials dockerconfig.Config
	err         error
}

// failure is a pull that failed.
type failure struct {
	message string
	at      time.Time
}

type reader struct {
	config Config
	core   corev1client.CoreV1Interface
	images rest.Interface
	facts  *facts
}

func newReader(config Config) (*reader, error) {
	connection, err := rest.HTTPClientFor(config.Client)
	if err != nil {
		return nil, fmt.Errorf("connection to the API server: %w", err)
	}
	core, err := corev1client.NewForConfigAndClient(impsync.Protobuf(config.Client), connection)
	if err != nil {
		return nil, fmt.Errorf("client: %w", err)
	}
	images, err := impsync.ImagesClient(config.Client, connection)
	return &reader{config: config, core: core, images: images, facts: &facts{
		rendered: map[types.UID]impsync.Rendered{}, secrets: map[string]*secret{}, unknown: []string{},
	}}, err
}

// may reports whether something could be read; what may not be is noted, and any other error passed on.
func (r *reader) may(err error, what, consequence string) (bool, error) {
	switch {
	case err == nil:
		return true, nil
	case apierrors.IsForbidden(err):
		r.facts.unknown = append(r.facts.unknown, fmt.Sprintf("cannot %s: forbidden; %s", what, consequence))
		return false, nil
	}
	return false, fmt.Errorf("%s: %w", what, err)
}

func (r *reader) read(ctx context.Context, namespace, name string) (*facts, error) {
	f := r.facts
	var err error
	if f.pod, err = r.core.Pods(namespace).Get(ctx, name, metav1.GetOptions{}); err != nil {
		return nil, err
	}
	if err := r.readSurroundings(ctx); err != nil {
		return nil, err
	}
	if err := r.readResources(ctx); err != nil {
		return nil, err
	}
	return f, r.readSecrets(ctx)
}

// readSurroundings reads the Pod's namespace, ServiceAccount and Events.
func (r *reader) readSurroundings(ctx context.Context) error {
	f := r.facts
	namespace, err := r.core.Namespaces().Get(ctx, f.pod.Namespace, metav1.GetOptions{})
	may, err := r.may(err, "get Namespace "+f.pod.Namespace, "whether its labels and annotations have it selected is unknown")
	if err != nil {
		return err
	}
	if may {
		f.namespace = namespace
	}
	account, err := r.core.ServiceAccounts(f.pod.Namespace).Get(ctx, f.pod.Spec.ServiceAccountName, metav1.GetOptions{})
	if apierrors.IsNotFound(err) {
		account, err = &corev1.ServiceAccount{}, nil // it is gone by now, and names nothing
	}
	may, err = r.may(err, "get ServiceAccount "+f.pod.Namespace+"/"+f.pod.Spec.ServiceAccountName, "whether it names the Secret by now is unknown")
	if err != nil {
		return err
	}
	if may {
		f.account = account
	}
	f.template, err = impsync.TemplateOf(ctx, r.core.RESTClient(), f.pod)
	if f.seesTemplate, err = r.may(err, "get the Pod's controller", "whether its template names pull Secrets of its own is unknown"); err != nil {
		return err
	}
	events, err := r.core.Events(f.pod.Namespace).List(ctx, metav1.ListOptions{FieldSelector: "involvedObject.uid=" + string(f.pod.UID)})
	may, err = r.may(err, "list Events in "+f.pod.Namespace, "when a pull failed, and perhaps why, is unknown")
	if may {
		for i := range events.Items {
			if e := &events.Items[i]; e.Reason == "Failed" { // of pkg/kubelet/events/event.go: FailedToPullImage
				f.failures = append(f.failures, failure{e.Message, lastOf(e)})
			}
		}
		slices.SortStableFunc(f.failures, func(a, b failure) int { return b.at.Compare(a.at) })
	}
	return err
}

func lastOf(e *corev1.Event) time.Time {
	switch {
	case e.Series != nil:
		return e.Series.LastObservedTime.Time
	case !e.LastTimestamp.IsZero():
		return e.LastTimestamp.Time
	default:
		return e.EventTime.Time
	}
}

// readResources reads the ImagePullSecrets and what they deliver.
func (r *reader) readResources(ctx context.Context) error {
	f := r.facts
	list, err := impsync.ListImages(ctx, r.images, metav1.ListOptions{})
	if apierrors.IsNotFound(err) {
		return nil
	}
	f.installed = true
	if f.listed, err = r.may(err, "list ImagePullSecrets", "only those are known whose Secrets the Pod or its ServiceAccount names"); err != nil || !f.listed {
		return err
	}
	f.resources = list.Items
	byPods := false
	for i := range f.resources {
		resource := &f.resources[i]
		name := impsync.RenderedName(resource.UID)
		rendered, err := r.core.Secrets(r.config.RenderedNamespace).Get(ctx, name, metav1.GetOptions{})
		if apierrors.IsForbidden(err) {
			_, err := r.may(err, "get Secrets in "+r.config.RenderedNamespace, "what an ImagePullSecret has credentials for is told by its Secret in the Pod's namespace alone")
			return errors.Join(err, r.readNeighbours(ctx))
		}
		if err != nil && !apierrors.IsNotFound(err) {
			return fmt.Errorf("get Secret %s/%s: %w", r.config.RenderedNamespace, name, err)
		}
		f.rendered[resource.UID] = impsync.Rendered{}
		if err == nil {
			decoded, err := impsync.DecodeRendered(rendered, impsync.FormatVersions())
			if err != nil {
				f.unknown = append(f.unknown, fmt.Sprintf("cannot read what ImagePullSecret %s delivers: %v", resource.Name, err))
				delete(f.rendered, resource.UID)
				continue
			}
			f.rendered[resource.UID] = decoded
		}
		pods := resource.Spec.Target.NamespacesWithPods
		byPods = byPods || len(pods.Labels)+len(pods.Annotations) > 0
	}
	if !byPods {
		return nil
	}
	return r.readNeighbours(ctx)
}

// readNeighbours reads the Pods of the namespace, whose labels and annotations may have it selected.
func (r *reader) readNeighbours(ctx context.Context) error {
	f := r.facts
	pods, err := r.core.Pods(f.pod.Namespace).List(ctx, metav1.ListOptions{FieldSelector: "spec.nodeName!="})
	may, err := r.may(err, "list Pods in "+f.pod.Namespace, "whether another Pod has the namespace selected is unknown")
	if may {
		f.neighbours = pods.Items
	} else if f.pod.Spec.NodeName != "" {
		f.neighbours = []corev1.Pod{*f.pod}
	}
	return err
}

// readSecrets reads those Secrets of the namespace that are of any resource, or that the Pod or its ServiceAccount names.
func (r *reader) readSecrets(ctx context.Context) error {
	f := r.facts
	names := impsync.PullSecrets(f.pod.Spec.ImagePullSecrets)
	if f.account != nil {
		names = append(names, impsync.PullSecrets(f.account.ImagePullSecrets)...)
	}
	for i := range f.resources {
		names = append(names, f.resources[i].Spec.Target.Secret.Name)
		if rendered := f.rendered[f.resources[i].UID]; !rendered.Target.IsZero() {
			names = append(names, rendered.Target.Name())
		}
	}
	slices.Sort(names)
	for _, name := range slices.Compact(names) {
		if name == "" {
			continue
		}
		object, err := r.core.Secrets(f.pod.Namespace).Get(ctx, name, metav1.GetOptions{})
		if apierrors.IsNotFound(err) {
			f.secrets[name] = nil
			continue
		}
		may, err := r.may(err, "get Secret "+f.pod.Namespace+"/"+name, "whether it is there, and whose, is unknown")
		if err != nil {
			return err
		}
		if may {
			f.secrets[name] = secretOf(object)
		}
	}
	return nil
}

func secretOf(object *corev1.Secret) *secret {
	s := &secret{existing: impsync.ExistingOf(&metav1.PartialObjectMetadata{ObjectMeta: object.ObjectMeta})}
	for _, ref := range object.OwnerReferences {
		if ref.UID == s.existing.OwnerUID {
			s.owner = ref.Name
		}
	}
	for _, entry := range object.ManagedFields {
		if entry.Manager == impsync.FieldManager && entry.Time != nil {
			s.written = entry.Time.Time
		}
	}
	s.credentials, _, s.err = dockerconfig.Parse(string(object.Type), object.Data)
	return s
}
