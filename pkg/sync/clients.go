package sync

import (
	"context"
	"fmt"
	"net/http"
	"time"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/apimachinery/pkg/runtime/serializer"
	"k8s.io/apimachinery/pkg/watch"
	"k8s.io/client-go/metadata"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/tools/cache"

	"github.com/imps-node/imps/pkg/api/v1alpha1"
)

// CallTimeout bounds one request to the API server.
const CallTimeout = 10 * time.Second

// Protobuf returns a configuration for the types that have it: cheaper to decode than JSON.
func Protobuf(config *rest.Config) *rest.Config {
	config = rest.CopyConfig(config)
	config.ContentType = runtime.ContentTypeProtobuf
	config.AcceptContentTypes = runtime.ContentTypeProtobuf + "," + runtime.ContentTypeJSON
	return config
}

// ImagesClient returns a client for ImagePullSecrets.
func ImagesClient(config *rest.Config, connection *http.Client) (rest.Interface, error) {
	scheme := runtime.NewScheme()
	if err := v1alpha1.AddToScheme(scheme); err != nil {
		return nil, err
	}
	config = rest.CopyConfig(config)
	config.GroupVersion = &v1alpha1.GroupVersion
	config.APIPath = "/apis"
	config.NegotiatedSerializer = serializer.NewCodecFactory(scheme).WithoutConversion()
	client, err := rest.RESTClientForConfigAndClient(config, connection)
	if err != nil {
		return nil, fmt.Errorf("client for ImagePullSecrets: %w", err)
	}
	return client, nil
}

// ListImages lists ImagePullSecrets with the client of ImagesClient.
func ListImages(ctx context.Context, client rest.Interface, options metav1.ListOptions) (*v1alpha1.ImagePullSecretList, error) {
	list := &v1alpha1.ImagePullSecretList{}
	err := client.Get().Resource(v1alpha1.Resource.Resource).VersionedParams(&options, metav1.ParameterCodec).Do(ctx).Into(list)
	return list, err
}

// TypedListWatch lists and watches with the methods of a typed client and these selectors.
func TypedListWatch[L runtime.Object](
	list func(context.Context, metav1.ListOptions) (L, error),
	watcher func(context.Context, metav1.ListOptions) (watch.Interface, error),
	selectors metav1.ListOptions,
) cache.ListerWatcher {
	return &cache.ListWatch{
		ListWithContextFunc: func(ctx context.Context, options metav1.ListOptions) (runtime.Object, error) {
			options.FieldSelector, options.LabelSelector = selectors.FieldSelector, selectors.LabelSelector
			return list(ctx, options)
		},
		WatchFuncWithContext: func(ctx context.Context, options metav1.ListOptions) (watch.Interface, error) {
			options.FieldSelector, options.LabelSelector = selectors.FieldSelector, selectors.LabelSelector
			return watcher(ctx, options)
		},
	}
}

// MetadataListWatch lists and watches the metadata of a resource in all namespaces.
func MetadataListWatch(client metadata.Interface, resource schema.GroupVersionResource, fieldSelector string) cache.ListerWatcher {
	getter := client.Resource(resource)
	return TypedListWatch(getter.List, getter.Watch, metav1.ListOptions{FieldSelector: fieldSelector})
}
