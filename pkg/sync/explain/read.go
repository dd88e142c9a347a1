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
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/apimachinery/pkg/types"
	corev1client "k8s.io/client-go/kubernetes/typed/core/v1"
	"k8s.io/client-go/metadata"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/tools/pager"

	"github.com/imps-node/imps/pkg/api/v1alpha1"
	"github.com/imps-node/imps/pkg/dockerconfig"
	impsync "github.com/imps-node/imps/pkg/sync"
)

const (
	// pageSize is how many objects are listed at once: rendered Secrets may be large.
	pageSize = 100
	// namesMax bounds the Secrets that are read because a Pod or ServiceAccount names them.
	namesMax = 50
)

// facts are what the caller may see of everything that matters to a Pod.
type facts struct {
	pod *corev1.Pod
	// template is what the Pod's controller would make it anew from; nil where there is none, or, unless seesTemplate, where
	// that is not known.
	template     *corev1.PodSpec
	seesTemplate bool
	// account is the Pod's ServiceAccount, nil where there is none, or, unless seesAccount, where that is not known.
	account     *corev1.ServiceAccount
	seesAccount bool
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
	// neighbours are the Pods of the namespace that are bound to a node, and the Pod itself; only that, unless seesPods.
	neighbours []metav1.ObjectMeta
	seesPods   bool
	node       nodeFacts
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

// nodeFacts are what is known of the Pod's node, where a resource asks for its kubelet.
type nodeFacts struct {
	// report is its agent's, nil where there is none, or, unless seen, where that is not known.
	report *impsync.Report
	seen   bool
	// kubelet is the version of its kubelet, empty where that is not known.
	kubelet string
}

// failure is a pull that failed.
type failure struct {
	message string
	at      time.Time
}

type reader struct {
	config   Config
	core     corev1client.CoreV1Interface
	metadata metadata.Interface
	images   rest.Interface
	facts    *facts
}

func newReader(config Config) (*reader, error) {
	connection, err := rest.HTTPClientFor(config.Client)
	if err != nil {
		return nil, fmt.Errorf("connection to the API server: %w", err)
	}
	r := &reader{config: config, facts: &facts{rendered: map[types.UID]impsync.Rendered{}, secrets: map[string]*secret{}, unknown: []string{}}}
	if r.core, err = corev1client.NewForConfigAndClient(impsync.Protobuf(config.Client), connection); err != nil {
		return nil, fmt.Errorf("client: %w", err)
	}
	if r.metadata, err = metadata.NewForConfigAndClient(config.Client, connection); err != nil {
		return nil, fmt.Errorf("metadata client: %w", err)
	}
	r.images, err = impsync.ImagesClient(config.Client, connection)
	return r, err
}

// may reports whether something could be read; what may not be is noted, once, and any other error passed on.
func (r *reader) may(err error, what, consequence string) (bool, error) {
	switch {
	case err == nil:
		return true, nil
	case apierrors.IsForbidden(err):
		if note := fmt.Sprintf("cannot %s: forbidden; %s", what, consequence); !slices.Contains(r.facts.unknown, note) {
			r.facts.unknown = append(r.facts.unknown, note)
		}
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
	for _, read := range []func(context.Context) error{r.readNamespace, r.readAccount, r.readTemplate, r.readEvents, r.readResources, r.readNode, r.readNeighbours, r.readSecrets} {
		if err := read(ctx); err != nil {
			return nil, err
		}
	}
	return f, nil
}

func (r *reader) readNamespace(ctx context.Context) error {
	name := r.facts.pod.Namespace
	namespace, err := r.core.Namespaces().Get(ctx, name, metav1.GetOptions{})
	may, err := r.may(err, "get Namespace "+name, "whether its labels and annotations have it selected is unknown")
	if may {
		r.facts.namespace = namespace
	}
	return err
}

func (r *reader) readAccount(ctx context.Context) error {
	f := r.facts
	name := f.pod.Spec.ServiceAccountName
	if name == "" { // as of a static Pod
		f.seesAccount = true
		return nil
	}
	account, err := r.core.ServiceAccounts(f.pod.Namespace).Get(ctx, name, metav1.GetOptions{})
	if apierrors.IsNotFound(err) {
		f.seesAccount = true
		return nil
	}
	may, err := r.may(err, "get ServiceAccount "+f.pod.Namespace+"/"+name, "whether it names the Secret by now is unknown")
	if may {
		f.account, f.seesAccount = account, true
	}
	return err
}

func (r *reader) readTemplate(ctx context.Context) error {
	template, err := impsync.TemplateOf(ctx, r.core.RESTClient(), r.facts.pod)
	may, err := r.may(err, "get the Pod's controller", "whether its template names pull Secrets of its own is unknown")
	r.facts.template, r.facts.seesTemplate = template, may
	return err
}

func (r *reader) readEvents(ctx context.Context) error {
	f := r.facts
	events, err := r.core.Events(f.pod.Namespace).List(ctx, metav1.ListOptions{FieldSelector: "involvedObject.uid=" + string(f.pod.UID)})
	may, err := r.may(err, "list Events in "+f.pod.Namespace, "when a pull failed, and perhaps why, is unknown")
	if !may {
		return err
	}
	for i := range events.Items {
		if e := &events.Items[i]; e.Reason == "Failed" { // of pkg/kubelet/events/event.go: FailedToPullImage
			f.failures = append(f.failures, failure{e.Message, lastOf(e)})
		}
	}
	slices.SortStableFunc(f.failures, func(a, b failure) int { return b.at.Compare(a.at) })
	return nil
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
	if f.listed, err = r.may(err, "list ImagePullSecrets", "only those are known whose Secrets the Pod or its ServiceAccount names, and not whether kubelets are served"); err != nil || !f.listed {
		return err
	}
	f.resources = list.Items
	found := map[types.UID]impsync.Rendered{}
	pages := pager.New(func(ctx context.Context, options metav1.ListOptions) (runtime.Object, error) {
		return r.core.Secrets(r.config.RenderedNamespace).List(ctx, options)
	})
	pages.PageSize = pageSize
	err = pages.EachListItem(ctx, metav1.ListOptions{}, func(o runtime.Object) error {
		s, ok := o.(*corev1.Secret)
		if !ok || s.Type != impsync.RenderedType {
			return nil
		}
		rendered, err := impsync.DecodeRendered(s, impsync.FormatVersions())
		if err != nil {
			f.unknown = append(f.unknown, fmt.Sprintf("cannot read rendered Secret %s: %v", s.Name, err))
			return nil
		}
		found[rendered.Resource.UID] = rendered
		return nil
	})
	if may, err := r.may(err, "list Secrets in "+r.config.RenderedNamespace, "what an ImagePullSecret has credentials for is told by its Secret in the Pod's namespace alone"); err != nil || !may {
		return err
	}
	for i := range f.resources {
		resource := &f.resources[i]
		rendered, there := found[resource.UID]
		if !there && resource.Status.Namespaces != nil && resource.Status.Namespaces.Delivered > 0 {
			f.unknown = append(f.unknown, fmt.Sprintf("nothing of ImagePullSecret %s is in %s, though it says that it delivers: is --rendered-namespace right?", resource.Name, r.config.RenderedNamespace))
			continue
		}
		f.rendered[resource.UID] = rendered
	}
	return nil
}

// readNode reads what is to be known of the Pod's node, where its kubelet may be served credentials for an image of the Pod.
func (r *reader) readNode(ctx context.Context) error {
	f, name, images := r.facts, r.facts.pod.Spec.NodeName, imagesOf(r.facts.pod)
	scopes := map[v1alpha1.KubeletScope]bool{}
	for i := range f.resources {
		rendered := f.rendered[f.resources[i].UID]
		if rendered.Kubelet != "" && serves(rendered, images) {
			scopes[rendered.Kubelet] = true
		}
	}
	byNamespace := scopes[v1alpha1.KubeletScopeNamespace]
	if name == "" || !byNamespace && !scopes[v1alpha1.KubeletScopeNode] {
		return nil
	}
	if byNamespace {
		object, err := r.core.Nodes().Get(ctx, name, metav1.GetOptions{})
		may, err := r.may(err, "get Node "+name, "whether its kubelet is new enough for the scope Namespace is unknown")
		switch {
		case may:
			f.node.kubelet = object.Status.NodeInfo.KubeletVersion
		case err != nil && !apierrors.IsNotFound(err):
			return err
		}
	}
	report := r.config.Namespace + "/" + impsync.ReportName(name)
	object, err := r.core.ConfigMaps(r.config.Namespace).Get(ctx, impsync.ReportName(name), metav1.GetOptions{})
	if apierrors.IsNotFound(err) {
		f.node.seen = true
		return nil
	}
	may, err := r.may(err, "get ConfigMap "+report, "whether the node serves its kubelet is unknown")
	if !may {
		return err
	}
	decoded, err := impsync.DecodeReport(object.Data)
	if err != nil {
		f.unknown = append(f.unknown, fmt.Sprintf("cannot read ConfigMap %s: %v", report, err))
		return nil
	}
	f.node.report, f.node.seen = &decoded, true
	return nil
}

// readNeighbours reads the Pods of the namespace, whose labels and annotations may have it selected, where any resource goes by
// that. The Pod itself counts, also before it is bound, as it will.
func (r *reader) readNeighbours(ctx context.Context) error {
	f := r.facts
	f.neighbours = []metav1.ObjectMeta{f.pod.ObjectMeta}
	byPods := func(s v1alpha1.PodSelector) bool { return len(s.Labels)+len(s.Annotations) > 0 }
	if !slices.ContainsFunc(f.resources, func(r v1alpha1.ImagePullSecret) bool {
		return byPods(r.Spec.Target.NamespacesWithPods) || byPods(f.rendered[r.UID].Pods)
	}) {
		f.seesPods = true
		return nil
	}
	pages := pager.New(func(ctx context.Context, options metav1.ListOptions) (runtime.Object, error) {
		return r.metadata.Resource(schema.GroupVersionResource{Version: "v1", Resource: "pods"}).Namespace(f.pod.Namespace).List(ctx, options)
	})
	err := pages.EachListItem(ctx, metav1.ListOptions{FieldSelector: "spec.nodeName!="}, func(o runtime.Object) error {
		if m, ok := o.(*metav1.PartialObjectMetadata); ok {
			f.neighbours = append(f.neighbours, metav1.ObjectMeta{Labels: m.Labels, Annotations: m.Annotations})
		}
		return nil
	})
	f.seesPods, err = r.may(err, "list Pods in "+f.pod.Namespace, "whether another Pod has the namespace selected is unknown")
	return err
}

// readSecrets reads those Secrets of the namespace that the Pod or its ServiceAccount names, and those of the resources that have
// credentials for an image of the Pod, or may have.
func (r *reader) readSecrets(ctx context.Context) error {
	f := r.facts
	names := impsync.PullSecrets(f.pod.Spec.ImagePullSecrets)
	if f.account != nil {
		names = append(names, impsync.PullSecrets(f.account.ImagePullSecrets)...)
	}
	if len(names) > namesMax {
		f.unknown = append(f.unknown, fmt.Sprintf("of %d Secrets that the Pod and its ServiceAccount name, %d were read", len(names), namesMax))
		names = names[:namesMax]
	}
	images := imagesOf(f.pod)
	for i := range f.resources {
		resource := &f.resources[i]
		rendered, visible := f.rendered[resource.UID]
		switch {
		case rendered.Target.IsZero():
			names = append(names, resource.Spec.Target.Secret.Name)
		case !visible, serves(rendered, images):
			names = append(names, rendered.Target.Name())
		}
	}
	slices.Sort(names)
	for _, name := range slices.Compact(names) {
		if len(rest.IsValidPathSegmentName(name)) > 0 || name == "" {
			f.secrets[name] = nil // nothing can have that name
			continue
		}
		object, err := r.core.Secrets(f.pod.Namespace).Get(ctx, name, metav1.GetOptions{})
		if apierrors.IsNotFound(err) {
			f.secrets[name] = nil
			continue
		}
		may, err := r.may(err, "get Secrets in "+f.pod.Namespace, "whether they are there, and whose, is unknown")
		if err != nil {
			return err
		}
		if may {
			f.secrets[name] = secretOf(object)
		}
	}
	return nil
}

func serves(rendered impsync.Rendered, images []string) bool {
	credentials, err := rendered.Target.Credentials()
	return err != nil || slices.ContainsFunc(images, credentials.Serves)
}

// imagesOf returns all images that a Pod wants.
func imagesOf(pod *corev1.Pod) (images []string) {
	for _, c := range slices.Concat(pod.Spec.InitContainers, pod.Spec.Containers) {
		images = append(images, c.Image)
	}
	for _, c := range pod.Spec.EphemeralContainers {
		images = append(images, c.Image)
	}
	for _, v := range pod.Spec.Volumes {
		if v.Image != nil {
			images = append(images, v.Image.Reference)
		}
	}
	return images
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

// Pod explains a Pod. What the caller may not see is told in the result and is no error, but for the Pod itself.
func Pod(ctx context.Context, config Config, namespace, name string) (Result, error) {
	r, err := newReader(config)
	if err != nil {
		return Result{}, err
	}
	ctx, cancel := context.WithTimeout(ctx, 6*impsync.CallTimeout)
	defer cancel()
	facts, err := r.read(ctx, namespace, name)
	if errors.Is(err, context.DeadlineExceeded) {
		err = errors.New("the API server does not answer in time")
	}
	if err != nil {
		return Result{}, fmt.Errorf("explain Pod %s/%s: %w", namespace, name, err)
	}
	return facts.explain(config.Excluded, time.Now()), nil
}
